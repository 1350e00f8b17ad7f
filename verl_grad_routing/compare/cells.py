"""The cells of a grid: each one training run with everything that decides it, checked before the first one starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from verl_grad_routing.compare.grid import Arm, Grid, Place
from verl_grad_routing.compare.launch import quoted, seed_overrides
from verl_grad_routing.compare.own_ray import RAY, connected
from verl_grad_routing.compare.record import Record, settings_hash
from verl_grad_routing.compare.resume import ATTEMPT, attempted, checkpoints
from verl_grad_routing.compare.runs import METRICS
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

ENVIRONMENTS_FOLDER = "environments"


@dataclass(frozen=True)
class Built:
    """An environment of a grid: ``place`` as written, its ``folder``, and ``config``, Hydra's name for it."""

    place: Place
    folder: Path
    config: str

    @property
    def manifest(self) -> Path:
        """Content that decides what runs see."""
        return self.folder / "manifest.json"


@dataclass(frozen=True)
class Cell:
    """One run: ``places`` are the overrides that only say where things are, and no part of its settings.

    It is validated after every ``validate_every`` steps, beside before and after training.
    """

    arm: Arm
    environment: str
    split: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    places: tuple[str, ...]
    manifest: Path
    validate_every: int

    @property
    def name(self) -> str:
        """For messages, and of the folder below the comparison's."""
        return f"{self.environment}/{self.arm.name}/seed-{self.seed}"

    @property
    def result_name(self) -> str:
        """Of the file with its result."""
        return f"{self.environment}.{self.arm.name}.seed-{self.seed}.json"

    @property
    def settings_hash(self) -> str:
        """Of preset, overrides, environment, versions and training code as they are now."""
        return settings_hash(self.arm.preset, self.overrides, [self.manifest])


def locate(place: Place, out: Path, base: Path) -> Built:
    """Where an environment is or will be built; nothing is built here.

    Args:
        place: The grid's entry.
        out: The comparison's folder.
        base: What a relative ``dir`` is relative to: the folder of the grid file.

    Raises:
        UserError: Unknown environment, a folder that is none or lacks the split, or no Hydra configuration for it.
    """
    from verl_grad_routing.envs import ENVIRONMENTS, Manifest

    where = f"environments.{place.name}"
    if place.dir is not None:
        folder = (base / place.dir).resolve()
        try:
            known_as = Manifest.read(folder).environment
        except UserError as error:
            raise UserError(f"{where}.dir", place.dir, error.fix) from None
        if not (folder / f"{place.split}.parquet").is_file():
            raise UserError(f"{where}.split", place.split, f"{place.dir} has no {place.split}.parquet")
        manifest = Manifest.read(folder)
        stale = ENVIRONMENTS[known_as].stale(manifest) if known_as in ENVIRONMENTS else []
        if changed := manifest.damaged(folder) + stale:
            fix = f"changed since it was built: {', '.join(changed)}; build it again with vgr prepare --force"
            raise UserError(f"{where}.dir", place.dir, fix)
    else:
        folder, known_as = out / ENVIRONMENTS_FOLDER / place.name, place.prepare
        if known_as not in ENVIRONMENTS:
            raise UserError(f"{where}.prepare", known_as, nearest(known_as, list(ENVIRONMENTS)))
    config = place.config or known_as
    if config not in _configs():
        raise UserError(f"{where}.config", config, nearest(config, _configs()))
    return Built(place, folder, config)


def build(built: Built) -> None:
    """Build the environment, unless it is there or was given. Raises ``UserError``."""
    from verl_grad_routing.envs import prepare_environment

    place = built.place
    if place.dir is None:
        prepare_environment(place.prepare, built.folder, **place.options)
        if not (built.folder / f"{place.split}.parquet").is_file():
            fix = f"vgr prepare {place.prepare} writes no {place.split}.parquet; name another split"
            raise UserError(f"environments.{place.name}.split", place.split, fix)


def cells_of(grid: Grid, environments: Sequence[Built], out: Path) -> list[Cell]:
    """Every cell, seed by seed, so that what is finished after a part of them is paired."""
    return [
        _cell(grid, built, arm, seed, out) for seed in grid.seeds for built in environments for arm in grid.arms
    ]  # fmt: skip


def _cell(grid: Grid, built: Built, arm: Arm, seed: int, out: Path) -> Cell:
    place = built.place
    folder = out / place.name / arm.name / f"seed-{seed}"
    validate_every = grid.validate_every or grid.steps
    overrides = (
        f"+grad_routing/environment={built.config}",
        *grid.overrides,
        *place.overrides,
        f"data.val_files=${{grad_routing.environment.dir}}/{place.split}.parquet",
        f"trainer.total_training_steps={grid.steps}",
        f"trainer.test_freq={validate_every}",
        f"trainer.save_freq={grid.save_every or -1}",
        f"trainer.resume_mode={'auto' if grid.save_every else 'disable'}",
        *arm.overrides,
        *seed_overrides(seed),
    )
    places = [f"grad_routing.environment.dir={quoted(str(built.folder))}"]
    if grid.ray_address is not None:
        places += on_cluster(grid.ray_address, folder)
    return Cell(arm, place.name, place.split, seed, folder, overrides, tuple(places), built.manifest, validate_every)


def on_cluster(address: str, folder: Path) -> list[str]:
    """Overrides for a run in ``folder`` on the running Ray cluster at ``address``, in place of a Ray of its own.

    The cluster has its own sizes, temporary folder and environment of processes.
    """
    logger = f"{RAY}.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={quoted(str(folder / METRICS))}"
    return [*connected(address), logger]


def finished(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose folder holds their finished run.

    Raises:
        UserError: A folder holds a finished run of other settings, or an unfinished one with a checkpoint; nothing is
            touched.
    """
    done = []
    for cell in cells:
        record = Record.read(cell.folder)
        if record is None:
            _refuse_lost_checkpoints(cell)
            continue
        if record.settings_hash != cell.settings_hash:
            fix = "a finished run of other settings, versions or training code; move it away, or name another --to"
            raise UserError(cell.name, f"settings {record.settings_hash}", fix)
        done.append(cell)
    return done


def _refuse_lost_checkpoints(cell: Cell) -> None:
    """An unfinished run of other settings would be started over: that costs what its checkpoints hold."""
    steps, settings = checkpoints(cell.folder), attempted(cell.folder)
    if steps and settings != cell.settings_hash:
        what = "other" if settings else f"unknown ({ATTEMPT} cannot be read)"
        fix = (
            f"an unfinished run of {what} settings, versions or training code with a checkpoint of step {steps[-1]}; "
            "delete it or move it away, or name another --to"
        )
        raise UserError(cell.name, f"settings {settings}", fix)


def check_configurations(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[str, float | None]]:
    """Compose what Hydra would, of every arm in every environment; a slip shows now and not hours from now.

    Returns:
        Environment and arm -> ``num_cpus`` and ``num_gpus`` of the Ray that its runs start.

    Raises:
        UserError: An override that does not fit, or a detector, gate or intervention that refuses its settings.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from verl_grad_routing import resolvers
    from verl_grad_routing.config import build_methods, parse

    verl = importlib.util.find_spec("verl")  # found, not imported: that takes seconds
    if verl is None or verl.origin is None:
        raise UserError("verl", None, "not installed; see docs/install.md")
    resolvers.register()
    sizes = {}
    with hydra.initialize_config_dir(str(Path(verl.origin).parent / "trainer" / "config"), version_base=None):
        for cell in cells:
            if cell.seed != cells[0].seed:
                continue
            where = f"arms.{cell.arm.name} in {cell.environment}"
            try:
                given = [f"+grad_routing={cell.arm.preset}", *cell.overrides, *cell.places]
                config = hydra.compose("ppo_trainer", given)
                settings = OmegaConf.to_container(config.grad_routing, resolve=True, throw_on_missing=False)
                build_methods(parse(settings))  # type: ignore[arg-type]
                ray = {key: OmegaConf.select(config, f"ray_kwargs.ray_init.{key}") for key in ("num_cpus", "num_gpus")}
                sizes[cell.environment, cell.arm.name] = ray
            except UserError as error:
                raise UserError(f"{where}: {error.key}", error.value, error.fix) from None
            except (HydraException, OmegaConfBaseException) as error:
                text = " ".join(str(error).split())
                raise UserError(where, list(cell.arm.overrides), f"Hydra says: {text}") from None
    return sizes


def _configs() -> list[str]:
    folder = resources.files("verl_grad_routing").joinpath("conf").joinpath("grad_routing").joinpath("environment")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
