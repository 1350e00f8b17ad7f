"""Building the folder of a character-level environment: splits, pairs and the warmed-up model, atomically and once."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verl_grad_routing import __version__
from verl_grad_routing.envs.chars.world import World
from verl_grad_routing.envs.manifest import Manifest, hashes, replacing, reusable
from verl_grad_routing.envs.progress import progress
from verl_grad_routing.envs.splits import require_disjoint

RECORDED = ("torch", "transformers", "tokenizers", "pyarrow")


def build(world: World[Any, Any], to: Path, *, force: bool = False) -> Manifest:
    """Build ``world`` in the folder ``to``, or reuse what is complete there with the same settings.

    Writes ``model/`` (a Hugging Face folder), one parquet file per split in verl's format, ``pairs.jsonl`` and
    ``manifest.json``. ``force`` builds anew, also over other settings or damage.

    Raises:
        UserError: ``to`` holds something else, or two splits share a prompt.
    """
    to, settings = Path(to), world.config.recorded()
    if (found := reusable(to, world.name, world.layout, settings, force)) is not None:
        return found
    with replacing(to) as folder:
        tasks = world.tasks()
        sizes = _write_data(folder, world, tasks)
        statistics = _write_model(folder / "model", world, tasks)
        versions = {"verl-grad-routing": __version__, "python": sys.version.split()[0]}
        versions |= {package: version(package) for package in RECORDED}
        manifest = Manifest(world.name, world.layout, settings, versions, sizes, hashes(folder), statistics)
        manifest.write(folder)
    return manifest


def _write_data(folder: Path, world: World[Any, Any], tasks: dict[str, list[Any]]) -> dict[str, int]:
    import pyarrow
    import pyarrow.parquet

    rows = {
        split: [world.row(index, split, task) for index, task in enumerate(drawn)]
        for split, drawn in tasks.items()
        if split != "pairs"
    }
    require_disjoint({split: [row["prompt"] for row in table] for split, table in rows.items()})
    for split, table in rows.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{split}.parquet")
    lines = [json.dumps(world.pair(index, task)) + "\n" for index, task in enumerate(tasks["pairs"])]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(drawn) for name, drawn in tasks.items()}


def _write_model(folder: Path, world: World[Any, Any], tasks: dict[str, list[Any]]) -> dict[str, Any]:
    from verl_grad_routing.envs.chars.model import new_model, rates, save, warm_up
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer

    config = world.config
    tokenizer = build_tokenizer(world.alphabet)
    model = new_model(world.alphabet, config.seed, config.width, config.layers)
    taken = {task.letters for split in tasks.values() for task in split}
    with progress("warm-up", config.steps) as report:
        loss = warm_up(model, world.alphabet, world.demonstrations(taken), config.steps, report)
    save(model, tokenizer, folder)
    statistics: dict[str, Any] = {
        name: rates(model, tokenizer, world, tasks["val"], voice, seed=config.seed)
        for name, voice in world.voices.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**statistics, "loss": loss, "parameters": parameters}
