"""What decides a result beyond a command's words: files that overrides name, and packages that bring methods."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from verl_grad_routing.registry import METHODS_GROUP

WHOLE = 16 << 20  # bytes: up to this size a file counts whole, beyond it by its size and both ends
END = 1 << 16
# Keys whose folders a run writes: no settings.
WRITTEN = re.compile(
    r"^\+*(grad_routing\.record_dir|trainer\.(default_local_dir|validation_data_dir|rollout_data_dir)|hydra\..*)="
)
WORDS = re.compile(r"[^\s,;{}\[\]()'\"=]+")


def named_in(overrides: Iterable[str]) -> list[Path]:
    """Files and folders that exist and that the values of ``overrides`` name, each once; ``file#part`` is ``file``."""
    found: dict[Path, None] = {}
    for override in overrides:
        if WRITTEN.match(override):
            continue
        for word in WORDS.findall(override.partition("=")[2]):
            path = Path(word.partition("#")[0]).expanduser()
            if ("/" in word or "." in word) and path.name not in ("", "..") and path.exists():
                found[path] = None
    return list(found)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(b"".join(_content(file)))
    return digest.hexdigest()


def method_packages() -> list[str]:
    """``name version hash`` of every installed distribution that brings methods, by its modules' source."""
    found = set()
    for point in importlib.metadata.entry_points(group=METHODS_GROUP):
        top = point.value.partition(":")[0].partition(".")[0]
        spec = importlib.util.find_spec(top)  # found, not imported
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        if spec is not None and not places and spec.origin is not None:
            places = [spec.origin]
        source = hashlib.sha256()
        for place in map(Path, places):
            for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
                source.update(file.name.encode() + b"\0" + file.read_bytes())
        dist = point.dist
        found.add(f"{dist.name if dist else top} {dist.version if dist else '?'} {source.hexdigest()[:16]}")
    return sorted(found)


def _content(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    if size <= WHOLE:
        yield file.read_bytes()
        return
    yield str(size).encode()
    with file.open("rb") as opened:
        yield opened.read(END)
        opened.seek(size - END)
        yield opened.read(END)
