"""Folders that are complete or absent: built beside their destination, renamed into place, described by a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError

FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and how it was made; ``manifest.json`` is this as JSON.

    Attributes:
        environment: Registered name.
        layout: Version of the folder's layout and of its generator; another version is never reused.
        settings: The environment's ``Config``, all fields.
        versions: Package versions it was built with; a record, not compared.
        sizes: Rows per data file.
        sha256: Content hash of every other file, by path relative to the folder.
        statistics: Measurements of the model as built, e.g. hack and solve rate per voice.
    """

    environment: str
    layout: int
    settings: dict[str, Any]
    versions: dict[str, str]
    sizes: dict[str, int]
    sha256: dict[str, str]
    statistics: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of ``folder``. Raises ``UserError`` when it is absent or no manifest."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError("folder", str(folder), "not a prepared environment; make one with `vgr prepare`")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(str(path), str(error), "unreadable; move the folder away and prepare anew") from None

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    def damaged(self, folder: Path) -> list[str]:
        """Names of the files that are missing from ``folder`` or changed since it was built."""
        return [name for name, digest in self.sha256.items() if _digest(folder / name) != digest]

    def foreign(self, folder: Path) -> list[str]:
        """Names of the files in ``folder`` that are not the manifest's."""
        return sorted(name for name in _files(folder) if name not in self.sha256)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` but the manifest, by relative path."""
    return {name: _digest(folder / name) or "" for name in _files(folder)}


def reusable(folder: Path, environment: str, layout: int, settings: Mapping[str, Any], force: bool) -> Manifest | None:
    """The manifest of ``folder`` when it can be used as it is, or None when it must be built.

    Raises:
        UserError: ``folder`` holds something else, other settings or damaged files and ``force`` is off; or files that
            are not ours, which a rebuild would delete.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / FILE_NAME).is_file():
        raise UserError("to", str(folder), "exists and is no prepared environment; name a new or empty folder")
    found = Manifest.read(folder)
    wanted = {"environment": environment, "layout": layout, **settings}
    actual = {"environment": found.environment, "layout": found.layout, **found.settings}
    different = [key for key in wanted | actual if actual.get(key) != wanted.get(key)]
    damaged = found.damaged(folder)
    if not force:
        if not different and not damaged:
            return found
        key = f"{folder}:{different[0] if different else 'files'}"
        value = actual.get(different[0]) if different else damaged
        what = f"built with other settings (wanted {wanted.get(different[0])!r})" if different else "damaged"
        raise UserError(key, value, f"{what}; name another folder, or rebuild this one with force (--force)")
    if foreign := found.foreign(folder):
        raise UserError(str(folder), foreign[0], "not part of the environment; move it away, a rebuild replaces all")
    return None


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place on success and vanishes on any error."""
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fresh, old = scratch / "new", scratch / "old"
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != FILE_NAME]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
