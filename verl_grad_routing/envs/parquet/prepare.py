"""Checking an environment of the user's and writing its folder, atomically and once."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verl_grad_routing import __version__
from verl_grad_routing.directions.pairs import PairSet, load_pairs
from verl_grad_routing.envs.manifest import Manifest, hashes, replacing, reusable
from verl_grad_routing.envs.parquet.function import graded, load_function
from verl_grad_routing.envs.parquet.read import read_rows
from verl_grad_routing.envs.parquet.settings import NONE, Settings
from verl_grad_routing.envs.splits import require_disjoint
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

LAYOUT = 1  # raise with any change that gives other files for the same settings
Rows = list[dict[str, Any]]


def prepare_with(config: Settings, to: Path, *, force: bool = False) -> Manifest:
    """Check everything, then write the data files, ``pairs.jsonl`` and the manifest into the folder ``to``.

    The reward function stays where it is: the folder holds its path, and its hash where it is a file.

    Raises:
        UserError: A missing setting, a bad row or pair, splits that share a prompt, a reward function that cannot be
            called or lacks a fact, or ``to`` holds something else.
    """
    config.require_complete()
    settings = _settings(config)
    if (found := reusable(Path(to), "parquet", LAYOUT, settings, force)) is not None:
        return found
    splits = {name: read_rows(path) for name, path in config.splits.items()}
    require_disjoint({config.splits[name]: [row["prompt"] for row in rows] for name, rows in splits.items()})
    for name, rows in splits.items():
        _check_types(config, config.splits[name], rows)
    pairs = _checked_pairs(config)
    function = load_function(settings["reward"])
    if config.trial:
        _try(function, settings, splits["val"][0])
    with replacing(Path(to)) as folder:
        for name, path in config.splits.items():
            shutil.copyfile(Path(path).expanduser(), folder / f"{name}.parquet")
        _write_pairs(folder / "pairs.jsonl", pairs)
        sizes = {name: len(rows) for name, rows in splits.items()} | {"pairs": len(pairs)}
        versions = {"verl-grad-routing": __version__, "python": sys.version.split()[0], "pyarrow": version("pyarrow")}
        sources = {name: dict(Counter(row["data_source"] for row in rows)) for name, rows in splits.items()}
        manifest = Manifest("parquet", LAYOUT, settings, versions, sizes, hashes(folder), {"data_sources": sources})
        manifest.write(folder)
    return manifest


def _settings(config: Settings) -> dict[str, Any]:
    """As they are recorded: plain lists, an absolute path of the reward function, content hashes of the files."""
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    files = {name: Path(path).expanduser() for name, path in config.splits.items()}
    where, colon, function = config.reward.rpartition(":")
    if where.endswith(".py"):
        files["reward"] = Path(where).expanduser().resolve()
        settings["reward"] = f"{files['reward']}{colon}{function}"
    settings["sha256"] = {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()
    }
    return settings


def _check_types(config: Settings, path: str, rows: Rows) -> None:
    head, _, field = config.facts["loophole"].partition(".")
    if head != "extra_info":
        return
    for number, row in enumerate(rows, start=1):
        kind = (row.get("extra_info") or {}).get(field)
        if kind not in (*config.loopholes, NONE):
            fix = nearest(str(kind), [*config.loopholes, NONE])
            raise UserError(f"{path} row {number} extra_info.{field}", kind, fix)


def _checked_pairs(config: Settings) -> PairSet:
    pairs = load_pairs(config.pairs)
    for pair in pairs:
        where = f"{config.pairs} id={pair.id} tags"
        if not pair.tags:
            raise UserError(where, [], f"name the loophole type that the pair shows: {', '.join(config.known)}")
        for tag in pair.tags:
            if tag not in config.loopholes:
                raise UserError(where, tag, f"no loophole type; {nearest(tag, list(config.loopholes))}")
            if tag not in config.known:
                raise UserError(
                    where, tag, "the pairs show this type, so it is known: add it to known, or drop the pair"
                )
    return pairs


def _try(function: Any, settings: dict[str, Any], row: dict[str, Any]) -> None:
    arguments = {
        "data_source": row["data_source"],
        "solution_str": "",
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": row.get("extra_info") or {},
    }
    try:
        graded(function, settings, arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a user's function raises is the user's to mend
        fix = "fails on an empty answer to the first validation row; mend it, or set trial=false"
        raise UserError("reward", f"{type(error).__name__}: {error}", fix) from error


def _write_pairs(file: Path, pairs: PairSet) -> None:
    rows = [
        {
            "id": pair.id,
            "prompt": pair.chat or pair.prompt,
            "unwanted": pair.unwanted,
            "wanted": pair.wanted,
            "tags": list(pair.tags),
        }
        for pair in pairs
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
