"""What the candidate sees of the file system: the interpreter, its standard library, the C library, our runner."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/sandbox")
PROGRAM = FOLDER / "program.py"
HARNESS = Path(__file__).with_name("harness.py")
INTERPRETER = Path(os.path.realpath(sys.executable))
LIBRARIES = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Bind:
    """One entry of the sandbox's root: a read-only ``source`` at ``at``, a link's text, a device, a covered folder."""

    source: Path | str
    at: Path
    kind: str = "ro-bind"

    def arguments(self) -> list[str]:
        """bubblewrap's arguments."""
        return ["--tmpfs", str(self.at)] if self.kind == "cover" else [f"--{self.kind}", str(self.source), str(self.at)]

    def staged(self) -> Bind:
        """The same entry for a sandbox in the one that this entry is mounted in."""
        return self if self.kind in ("symlink", "cover") else Bind(self.at, self.at, self.kind)


def layout(program: Path) -> list[Bind]:
    """Everything under the sandbox's root for one ``program``, in the order in which it is mounted."""
    runner = [Bind(HARNESS, FOLDER / "harness.py"), Bind(program, PROGRAM)]
    return [*_python(), *runner, Bind("/dev/null", Path("/dev/null"), "dev-bind")]


def parents(binds: list[Bind]) -> list[Path]:
    """The folders above the entries, outermost first, that no entry brings along."""
    brought = [bind.at for bind in binds]
    above = {folder for bind in binds for folder in bind.at.parents if folder != Path("/")}
    return sorted(folder for folder in above if not any(folder == at or at in folder.parents for at in brought))


@functools.cache
def _python() -> tuple[Bind, ...]:
    """Interpreter and libraries at their own paths, with the folders of installed packages covered."""
    binds = []
    for name in LIBRARIES:
        path = Path(name)
        if path.is_symlink():
            binds.append(Bind(os.readlink(path), path, "symlink"))
        elif path.is_dir():
            binds.append(Bind(path, path))
    if os.path.exists("/etc/ld.so.cache"):
        binds.append(Bind(Path("/etc/ld.so.cache"), Path("/etc/ld.so.cache")))
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    wanted = [Path(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")]
    stdlib = [Path(os.path.realpath(path)) for path in (Path(os.__file__).parent, *wanted)]
    shared = Path(sysconfig.get_config_var("LIBDIR") or "/") / (sysconfig.get_config_var("INSTSONAME") or "")
    python: list[Path] = [*stdlib, INTERPRETER, *([shared] if shared.is_file() else [])]
    for path in python:
        if path.exists() and not any(bind.at == path or bind.at in path.parents for bind in binds):
            binds.append(Bind(path, path))
    return (*binds, *(Bind("", folder, "cover") for folder in _packages([bind.at for bind in binds])))


def _packages(folders: list[Path]) -> list[Path]:
    """Folders of installed packages below ``folders``: whatever is there is none of the candidate's business."""
    found = []
    for folder in folders:
        for name in PACKAGES:
            found += [folder / name, *folder.glob(f"python*/{name}")]
    return sorted({path for path in found if path.is_dir() and not path.is_symlink()})
