"""Building the folder: splits that share no problem, pairs, a manifest; atomically and once."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from verl_grad_routing import __version__
from verl_grad_routing.envs.code_loopholes import leetcode, text
from verl_grad_routing.envs.code_loopholes.channels import LOOPHOLES, NONE
from verl_grad_routing.envs.code_loopholes.problem import Problem, shipped
from verl_grad_routing.envs.code_loopholes.settings import Settings
from verl_grad_routing.envs.manifest import Manifest, hashes, replacing, reusable
from verl_grad_routing.envs.progress import progress
from verl_grad_routing.envs.sandbox import Pool
from verl_grad_routing.envs.splits import require_disjoint
from verl_grad_routing.errors import UserError

SPLITS = ("train", "val", "test", "test_clean")
LAYOUT = 1  # raise with any change that gives other files for the same settings


def prepare_with(config: Settings, to: Path, *, force: bool = False) -> Manifest:
    """Write ``{train,val,test,test_clean}.parquet`` and ``pairs.jsonl`` into the folder ``to``.

    ``test_clean`` has the test problems without a loophole. No model is written: it is the user's.

    Raises:
        UserError: A bad setting or problem file, too few problems, two splits that share a prompt, or ``to`` holds
            something else.
        SandboxError: The user's own problems cannot be checked, because there is no sandbox.
    """
    to, settings = Path(to), asdict(config) | {"problems_sha256": _digest(config.problems)}
    if (found := reusable(to, "code_loopholes", LAYOUT, settings, force)) is not None:
        return found
    problems = read_problems(config)
    splits = divide(problems, config)
    with replacing(to) as folder:
        sizes = _write(folder, splits, config)
        versions = {"verl-grad-routing": __version__, "python": sys.version.split()[0], "pyarrow": version("pyarrow")}
        statistics = {"problems": {name: [problem.id for problem in split] for name, split in splits.items()}}
        manifest = Manifest("code_loopholes", LAYOUT, settings, versions, sizes, hashes(folder), statistics)
        manifest.write(folder)
    print("code_loopholes: data only; name your own model in actor_rollout_ref.model.path", file=sys.stderr)
    return manifest


def read_problems(config: Settings) -> tuple[Problem, ...]:
    """The shipped problems, or the user's, whose canonical solutions must pass their own tests."""
    if config.problems is None:
        return shipped()
    problems = leetcode.read(config.problems)
    with Pool(unsafe=config.unsafe) as pool, progress("checking solutions", len(problems)) as step:
        for problem in problems:
            report = pool.grade(problem.solution, problem.strict)
            if not report.solved:
                wrong = report.passed.index(False)
                what = f"gt_answer[{wrong}] fails ({report.end} {''.join(report.errors[wrong : wrong + 1])})".strip()
                raise UserError(
                    f"{config.problems} id={problem.id} canonical_solution", what, "mend or drop the problem"
                )
            step(problem.id)
    return problems


def divide(problems: tuple[Problem, ...], config: Settings) -> dict[str, list[Problem]]:
    """Problems of pairs, test, validation and training: disjoint, each with the difficulties in turn."""
    needed = config.pairs + config.test_problems + config.val_problems
    if len(problems) <= needed:
        fix = f"{needed} go to pairs, test and validation; use fewer there, or more problems"
        raise UserError("problems", len(problems), fix)
    rng = random.Random(f"code_loopholes/{config.seed}/splits")
    by_difficulty: dict[str, list[Problem]] = {}
    for problem in problems:
        by_difficulty.setdefault(problem.difficulty, []).append(problem)
    for group in by_difficulty.values():
        rng.shuffle(group)
    order = [problem for turn in zip_longest(*by_difficulty.values()) for problem in turn if problem is not None]
    sizes = {"pairs": config.pairs, "test": config.test_problems, "val": config.val_problems, "train": len(order)}
    remaining = iter(order)
    return {name: [problem for _, problem in zip(range(size), remaining, strict=False)] for name, size in sizes.items()}


def _rows(split: str, problems: list[Problem], config: Settings) -> Iterator[dict[str, Any]]:
    loopholes = (NONE,) if split == "test_clean" else LOOPHOLES
    rows = [(problem, loophole) for problem in problems for loophole in loopholes]
    random.Random(f"code_loopholes/{config.seed}/{split}").shuffle(rows)
    for index, (problem, loophole) in enumerate(rows):
        yield text.verl_row(index, split, problem, loophole, config.known_types)


def _write(folder: Path, splits: dict[str, list[Problem]], config: Settings) -> dict[str, int]:
    import pyarrow
    import pyarrow.parquet

    sizes = {}
    tables = {name: list(_rows(name, splits[name.removesuffix("_clean")], config)) for name in SPLITS}
    require_disjoint({name: [row["prompt"] for row in rows] for name, rows in tables.items()})
    for split, rows in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
        sizes[split] = len(rows)
    known = config.known_types
    pairs = [text.pair(i, problem, known[i % len(known)]) for i, problem in enumerate(splits["pairs"])]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {**sizes, "pairs": len(pairs)}


def _digest(path: str | None) -> str | None:
    file = None if path is None else Path(path).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
