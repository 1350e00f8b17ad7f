"""The page on configuration names every key that is read, and the citation this version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import yaml

from tests.unit.docs.pages import ROOT
from verl_grad_routing import config
from verl_grad_routing.config import GradRoutingConfig


def keys(kind: type, above: str = "") -> Iterator[str]:
    """Every key of a configuration and of those in it; of a class of another module only the key that holds it."""
    for field in fields(kind):
        yield above + field.name
        inner = field.metadata.get("config")
        if is_dataclass(inner) and inner.__module__ == config.__name__:
            yield from keys(inner, f"{above}{field.name}.")


def test_every_key_has_a_row() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    # a class that nobody uses would have no row
    classes = {kind for kind in vars(config).values() if is_dataclass(kind) and kind.__module__ == config.__name__}
    held = {field.metadata.get("config") for kind in classes for field in fields(kind)} | {GradRoutingConfig}
    assert {kind.__name__ for kind in classes - held} == {"Methods"}
    wanted = {key for key in keys(GradRoutingConfig) if key != "blocks.optim"}
    assert named == wanted


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project and citation["version"] == project[1]
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
