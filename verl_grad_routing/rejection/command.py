"""``vgr rft``: sample a model, keep what is rewarded, drop what GRIFT takes for hacks, fine-tune on the rest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.rejection.choose import choose, report
from verl_grad_routing.rejection.data import write_rows
from verl_grad_routing.rejection.sample import Sample, sample
from verl_grad_routing.rejection.score import build_detector, grift_scores
from verl_grad_routing.rejection.settings import Rft
from verl_grad_routing.warm_up.command import run_sft

DATASET = "verl_grad_routing.rejection.data"
REPORT, ROWS, MODEL = "rft.json", "kept.jsonl", "model"


def rft(settings: Rft, to: Path) -> dict[str, Any]:
    """Write the fine-tuned ``model/``, ``kept.jsonl`` and ``rft.json`` into the new folder ``to``; returns the report.

    The folder appears when everything is in it.

    Raises:
        UserError: Bad settings or data, a detector that abstains, nothing left to learn from, a training that failed.
    """
    if to.exists():
        raise UserError("--to", str(to), "exists already; give a new folder")
    detector = None
    if settings.filter != "none":
        detector = build_detector(dict(settings.detector), settings.positive_reward)
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        samples = sample(settings)
        correct = [one for one in samples if one.reward >= settings.positive_reward]
        if not correct:
            fix = f"none of {len(samples)} responses has this reward; sample more, or a model that solves something"
            raise UserError("--positive-reward", settings.positive_reward, fix)
        scores = None if detector is None else grift_scores(settings.model, correct, detector).tolist()
        kept = choose(settings, correct, scores)
        found = report(settings, samples, correct, scores, kept)
        found["control"] = settings.filter == "permuted" or bool(detector and detector.knows_everything)
        found["layers"] = None if detector is None else list(detector.layers or ())
        (scratch / "out").mkdir()
        _finish(settings, [correct[row] for row in kept], found, scratch)
        os.replace(scratch / "out", to)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _finish(settings: Rft, kept: list[Sample], found: dict[str, Any], scratch: Path) -> None:
    out = scratch / "out"
    write_rows(out / ROWS, kept, settings.full_text)
    rows = min(settings.batch_size, len(kept) - len(kept) % settings.ranks)
    if rows == 0:
        raise UserError("--ranks", settings.ranks, f"each rank needs a response, and {len(kept)} were kept")
    steps = settings.epochs * (len(kept) // rows)
    longest = max(len(one.prompt) + len(one.response) for one in kept)
    arguments = sft_arguments(settings, scratch, rows, steps, longest)
    run_sft("rft", arguments, settings.ranks, settings.limit_s, scratch)
    shutil.move(scratch / f"global_step_{steps}" / "huggingface", out / MODEL)
    found |= {"steps": steps, "batch_size": rows, "model": str(settings.model), "lr": settings.lr}
    (out / REPORT).write_text(json.dumps(found, indent=2) + "\n")


def sft_arguments(settings: Rft, folder: Path, rows: int, steps: int, longest: int) -> list[str]:
    """Overrides of verl's SFT configuration.

    Args:
        rows: Of an optimizer step.
        longest: Tokens of the longest kept response with its prompt.
    """
    return [
        f"data.train_files='{folder / 'out' / ROWS}'",
        f"data.custom_cls.path=pkg://{DATASET}",
        "data.custom_cls.name=KeptResponses",
        f"data.train_batch_size={rows}",
        f"data.max_length={longest}",
        f"data.max_token_len_per_gpu={max(8192, longest)}",
        "data.num_workers=0",
        f"model.path={settings.model}",
        "engine.strategy=fsdp2",
        "engine.use_torch_compile=false",
        f"engine.seed={settings.seed}",
        f"optim.lr={settings.lr}",
        "optim.lr_scheduler_type=cosine",
        "checkpoint.save_contents=[model,hf_model]",
        f"trainer.total_training_steps={steps}",
        f"trainer.total_epochs={settings.epochs}",
        f"trainer.save_freq={steps}",
        "trainer.resume_mode=disable",
        "trainer.logger=[console]",
        f"trainer.n_gpus_per_node={settings.ranks}",
        f"trainer.default_local_dir={folder}",
        f"trainer.seed={settings.seed}",
        f"hydra.run.dir={folder}/hydra",
        *(["+model.override_config.attn_implementation=sdpa"] if not torch.cuda.is_available() else []),
        *settings.overrides,
    ]
