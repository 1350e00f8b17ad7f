"""The grid of a comparison: which arms, environments and seeds; read from YAML and checked before anything starts.

``vgr compare GRID.yaml`` runs every cell (environment, arm, seed). ``docs/comparison.md`` explains each key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from verl_grad_routing.compare.launch import seed_overrides
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import build_config, nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of folders and files: no dots, no slashes
# Overrides that the grid sets itself, and the key of the grid that says them.
OWNED = {key.partition("=")[0]: "seeds" for key in seed_overrides(0)} | {
    "trainer.total_training_steps": "steps",
    "trainer.test_freq": "validate_every",
    "trainer.save_freq": "save_every",
    "trainer.resume_mode": "save_every",
    "trainer.validation_data_dir": "--to",
    "trainer.default_local_dir": "--to",
    "hydra.run.dir": "--to",
    "data.val_files": "environments[].split",
    "grad_routing.environment.dir": "environments[].dir",
    "grad_routing": "arms[].preset",
    "grad_routing/environment": "environments[].config",
    "ray_kwargs.ray_init.address": "ray_address",
}


@dataclass(frozen=True)
class Arm:
    """One method or control.

    Attributes:
        name: Of the arm, in tables and folders.
        preset: ``+grad_routing=<preset>``; the name by default.
        overrides: Further Hydra overrides of this arm alone.
        seeds: Only to say again what the grid says: seeds are paired, every arm has the same.
    """

    name: str
    preset: str = ""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Place:
    """One environment.

    Attributes:
        name: Of the environment, in tables and folders.
        prepare: What ``vgr prepare`` calls it; the name by default. A ``dir`` says it itself.
        config: Hydra's name for it, ``+grad_routing/environment=<config>``; what ``vgr prepare`` calls it by default.
        options: Of its build, e.g. ``{seed: 1}``.
        dir: A folder built by ``vgr prepare``, relative to the grid file; without it the comparison builds its own.
        split: Data file that runs are validated on, ``test`` or ``val``: choose settings on ``val``, report ``test``.
        overrides: Further Hydra overrides of every run in this environment.
    """

    name: str
    prepare: str = ""
    config: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    dir: str | None = None
    split: str = "test"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A comparison: every arm in every environment with every seed.

    Attributes:
        name: Of the comparison; its folder by default.
        arms: See ``Arm``; in the order of the tables.
        environments: See ``Place``.
        seeds: Of every arm.
        steps: Training steps of each run.
        overrides: Hydra overrides of every run.
        validate_every: Steps between validations, beside those before and after training; 0 has only these.
        save_every: Steps between checkpoints, from which a killed cell goes on; 0 starts it over.
        limit_s: Seconds that one cell may take.
        jobs: Cells at once, each with a Ray of its own; never more than cores and memory allow.
        cores_per_cell: What one cell needs, for that limit.
        memory_gib_per_cell: The same of memory, GiB.
        reference: Arm that every other one is compared with.
        control: Second arm that every other one is compared with; null for none.
        ray_address: A running Ray cluster, ``auto`` or ``host:port``; null gives each cell its own on this machine.
    """

    name: str
    arms: tuple[Arm, ...]
    environments: tuple[Place, ...]
    seeds: tuple[int, ...]
    steps: int
    overrides: tuple[str, ...] = ()
    validate_every: int = 0
    save_every: int = 0
    limit_s: float = 7200.0
    jobs: int = 1
    cores_per_cell: int = 2
    memory_gib_per_cell: float = 8.0
    reference: str = "off"
    control: str | None = "random"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        _name("name", self.name)
        for key, least in (("steps", 1), ("validate_every", 0), ("save_every", 0), ("jobs", 1), ("cores_per_cell", 1)):
            _whole(key, getattr(self, key), least)
        for key in ("limit_s", "memory_gib_per_cell"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(key, value, "give a positive number")
        if not self.arms or not self.environments or not self.seeds:
            key = next(key for key in ("arms", "environments", "seeds") if not getattr(self, key))
            raise UserError(key, [], "give at least one")
        for seed in self.seeds:
            _whole("seeds", seed, 0)
        _distinct("seeds", self.seeds)
        _distinct("arms", [arm.name for arm in self.arms])
        _distinct("environments", [place.name for place in self.environments])
        for arm in self.arms:
            _name("arms.name", arm.name)
            if arm.seeds is not None and arm.seeds != self.seeds:
                fix = f"seeds are paired: every arm has the grid's, {list(self.seeds)}; remove the key"
                raise UserError(f"arms.{arm.name}.seeds", list(arm.seeds), fix)
            _overrides(f"arms.{arm.name}.overrides", arm.overrides)
            if arm.preset not in presets():
                raise UserError(f"arms.{arm.name}.preset", arm.preset, nearest(arm.preset, presets()))
        for place in self.environments:
            _name("environments.name", place.name)
            _name(f"environments.{place.name}.split", place.split)
            _overrides(f"environments.{place.name}.overrides", place.overrides)
        _overrides("overrides", self.overrides)
        names = [arm.name for arm in self.arms]
        for key in ("reference", "control"):
            if (name := getattr(self, key)) is not None and name not in names:
                hint = " (or null, to compare with the reference alone)" if key == "control" else ""
                raise UserError(key, name, f"no arm of this grid; give one of {', '.join(names)}{hint}")


def load_grid(path: Path | str) -> Grid:
    """Read a grid file. Raises ``UserError`` in one line for whatever is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UserError("GRID", str(path), "no such file; see recipes/comparison for examples")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise UserError("GRID", str(path), f"no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError("GRID", str(path), "must be a mapping with the keys name, arms, environments, seeds and steps")
    try:
        return parse_grid(values)
    except UserError as error:
        raise UserError(f"{path.name}: {error.key}", error.value, error.fix) from None


def parse_grid(values: Mapping[str, Any]) -> Grid:
    """The grid of a plain mapping, as YAML gives it. Raises ``UserError``."""
    built = dict(values)
    for key in ("name", "arms", "environments", "seeds", "steps"):
        if key not in values:
            raise UserError(key, None, "this key is required")
    built["arms"] = tuple(_arm(index, entry) for index, entry in _entries("arms", values["arms"]))
    built["environments"] = tuple(_place(i, entry) for i, entry in _entries("environments", values["environments"]))
    for key in ("seeds", "overrides"):
        if key in values:
            built[key] = _tuple(key, values[key])
    try:
        return build_config(Grid, built, "grid")
    except UserError as error:
        raise UserError(error.key.removeprefix("grid."), error.value, error.fix) from None


def presets() -> list[str]:
    """Names of the presets that ship; files that start with an underscore are parts of others."""
    folder = resources.files("verl_grad_routing").joinpath("conf").joinpath("grad_routing")
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name[0] != "_")


def _arm(index: int, entry: Any) -> Arm:
    given = _entry(f"arms[{index}]", entry)
    for key in ("overrides", "seeds"):
        if given.get(key) is not None:
            given[key] = _tuple(f"arms.{given['name']}.{key}", given[key])
    return build_config(Arm, {"preset": given["name"], **given}, f"arms.{given['name']}")


def _place(index: int, entry: Any) -> Place:
    given = _entry(f"environments[{index}]", entry)
    where = f"environments.{given['name']}"
    given["overrides"] = _tuple(f"{where}.overrides", given.get("overrides", []))
    if not isinstance(given.get("options", {}), Mapping):
        raise UserError(f"{where}.options", given["options"], "give a mapping such as {seed: 1}")
    place: Place = build_config(Place, {"prepare": given["name"], **given}, where)
    if place.dir and place.options:
        raise UserError(f"{where}.options", dict(place.options), "dir names a folder that is built; remove one of them")
    return place


def _entries(key: str, value: Any) -> Iterable[tuple[int, Any]]:
    if not isinstance(value, list):
        raise UserError(key, value, "give a list, one entry each")
    return enumerate(value)


def _entry(where: str, entry: Any) -> dict[str, Any]:
    """A mapping with a name; a bare name stands for one."""
    given = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if not isinstance(given.get("name"), str):
        raise UserError(where, entry, "give a name, or a mapping with the key name")
    return given


def _tuple(key: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise UserError(key, value, "give a list")
    return tuple(value)


def _name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise UserError(key, value, "use letters, digits, - and _: it names files")


def _whole(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(key, value, f"give a whole number of at least {least}")


def _distinct(key: str, values: Sequence[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UserError(key, twice[0], "given twice; give each once")


def _overrides(where: str, overrides: Iterable[Any]) -> None:
    """Text in Hydra's form, and none that the grid sets itself: seeds would no longer be paired."""
    for override in overrides:
        if not isinstance(override, str) or ("=" not in override and not override.startswith("~")):
            raise UserError(where, override, "give Hydra overrides, key=value")
        key = override.lstrip("+~").partition("=")[0]
        if key in OWNED:
            raise UserError(where, override, f"the grid sets this itself; use its key {OWNED[key]}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: ``off`` is the name of a preset, not false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
