"""Building the folder: splits, pairs and the warmed-up model, atomically and once."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verl_grad_routing import __version__
from verl_grad_routing.envs.loopholes import text
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.manifest import Manifest, hashes, replacing, reusable
from verl_grad_routing.envs.progress import progress

LAYOUT = 1  # raise with any change that gives other files for the same settings
SPLITS = ("train", "val", "test")
RECORDED = ("torch", "transformers", "tokenizers", "pyarrow")


def prepare(
    to: Path,
    *,
    seed: int = 0,
    train_size: int = 4096,
    val_size: int = 256,
    test_size: int = 1024,
    pairs: int = 10,
    known: str = "leak",
    steps: int = 600,
    force: bool = False,
) -> Manifest:
    """Build the environment in the folder ``to``; see ``Settings`` for the settings.

    Writes ``model/`` (a Hugging Face folder), ``train.parquet``, ``val.parquet``, ``test.parquet`` (verl's format),
    ``pairs.jsonl`` and ``manifest.json``. A complete folder with the same settings is reused; ``force`` builds
    anew, also over other settings or damage.

    Raises:
        UserError: A bad setting, or ``to`` holds something else.
    """
    config = Settings(seed, train_size, val_size, test_size, pairs, known, steps)
    return prepare_with(config, to, force=force)


def prepare_with(config: Settings, to: Path, *, force: bool = False) -> Manifest:
    """As ``prepare``, from ``Settings``."""
    to, settings = Path(to), asdict(config)
    if (found := reusable(to, "loopholes", LAYOUT, settings, force)) is not None:
        return found
    with replacing(to) as folder:
        tasks = draw_tasks(config)
        sizes = _write_data(folder, tasks, config)
        statistics = _write_model(folder / "model", tasks, config)
        versions = {"verl-grad-routing": __version__, "python": sys.version.split()[0]}
        versions |= {package: version(package) for package in RECORDED}
        manifest = Manifest("loopholes", LAYOUT, settings, versions, sizes, hashes(folder), statistics)
        manifest.write(folder)
    return manifest


def draw_tasks(config: Settings) -> dict[str, list[text.Task]]:
    """The tasks of each split and of the pairs; no two share their letters, so none share a prompt."""
    taken: set[str] = set()
    tasks: dict[str, list[text.Task]] = {}
    for split in SPLITS:
        size = getattr(config, f"{split}_size")
        tasks[split] = text.draw_split(text.stream(config.seed, split), size, taken)
    rng = text.stream(config.seed, "pairs")
    tasks["pairs"] = []
    for _ in range(config.pairs):
        tasks["pairs"].append(text.draw_task(rng, config.known, taken))
        taken.add(tasks["pairs"][-1].letters)
    return tasks


def _write_data(folder: Path, tasks: dict[str, list[text.Task]], config: Settings) -> dict[str, int]:
    import pyarrow
    import pyarrow.parquet

    for split in SPLITS:
        rows = [text.verl_row(index, split, task, (config.known,)) for index, task in enumerate(tasks[split])]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    lines = [json.dumps(text.pair(index, task)) + "\n" for index, task in enumerate(tasks["pairs"])]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in tasks.items()}


def _write_model(folder: Path, tasks: dict[str, list[text.Task]], config: Settings) -> dict[str, Any]:
    from verl_grad_routing.envs.loopholes.model import new_model, rates, save, warm_up
    from verl_grad_routing.envs.loopholes.tokenizer import build_tokenizer

    start = time.perf_counter()
    tokenizer = build_tokenizer()
    model = new_model(config.seed)
    taken = {task.letters for split in tasks.values() for task in split}
    examples = text.demonstrations(text.stream(config.seed, "warm-up"), taken)
    with progress("warm-up", config.steps) as report:
        loss = warm_up(model, examples, config.steps, report)
    save(model, tokenizer, folder)
    names = {"neutral": text.NEUTRAL, "sly": text.SLY, "honest": text.HONEST}
    statistics: dict[str, Any] = {
        name: rates(model, tokenizer, tasks["val"], voice, seed=config.seed) for name, voice in names.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**statistics, "loss": loss, "parameters": parameters, "seconds": round(time.perf_counter() - start, 1)}
