"""Building the folder: splits, pairs and the pretrained model, atomically and once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from verl_grad_routing import __version__
from verl_grad_routing.envs.manifest import Manifest, hashes, replacing, reusable
from verl_grad_routing.envs.smollm2.settings import Settings
from verl_grad_routing.envs.smollm2.text import draw_tasks, verl_row
from verl_grad_routing.envs.splits import require_disjoint

LAYOUT = 1  # raise with any change that gives other files for the same settings
RECORDED = ("torch", "transformers", "tokenizers", "pyarrow", "gguf")


def prepare_with(config: Settings, to: Path, *, force: bool = False) -> Manifest:
    """Write ``model/``, ``{train,val,test}.parquet``, ``pairs.jsonl`` and the manifest into the folder ``to``.

    Raises:
        UserError: A bad setting, no model, or ``to`` holds something else.
    """
    import pyarrow
    import pyarrow.parquet

    from verl_grad_routing.envs.smollm2.model import write_model

    settings = {key: value for key, value in asdict(config).items() if key != "source"}  # where it lies is no setting
    if (found := reusable(Path(to), "smollm2", LAYOUT, settings, force)) is not None:
        return found
    with replacing(Path(to)) as folder:
        statistics = write_model(config.source, folder / "model")
        rows = {
            split: [verl_row(index, split, task) for index, task in enumerate(tasks)]
            for split, tasks in draw_tasks(config).items()
        }
        pairs = [json.loads(line) for line in pairs_text().splitlines()]
        prompts = {split: [row["prompt"] for row in table] for split, table in rows.items()}
        require_disjoint({**prompts, "pairs": [pair["prompt"] for pair in pairs]})
        for split, table in rows.items():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{split}.parquet")
        (folder / "pairs.jsonl").write_text(pairs_text(), encoding="utf-8")
        sizes = {split: len(table) for split, table in rows.items()} | {"pairs": len(pairs)}
        versions = {"verl-grad-routing": __version__, "python": sys.version.split()[0]}
        versions |= {package: version(package) for package in RECORDED}
        manifest = Manifest("smollm2", LAYOUT, settings, versions, sizes, hashes(folder), statistics)
        manifest.write(folder)
    return manifest


def pairs_text() -> str:
    """The pairs that ship with the package, as JSONL."""
    return files("verl_grad_routing.envs.smollm2").joinpath("pairs.jsonl").read_text(encoding="utf-8")
