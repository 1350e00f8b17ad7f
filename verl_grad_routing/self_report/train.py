"""The warm-up: supervised fine-tuning on lessons by verl's SFT trainer, and the model that RL then starts from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.chat import described
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces.basis import model_hash
from verl_grad_routing.warm_up.command import WarmUp, train_sft

CARD = "self_report.json"


def self_report_model(settings: WarmUp, to: Path) -> Path:
    """Train all weights of ``settings.model`` on the wanted sides of ``settings.pairs`` and write a model folder.

    Raises:
        UserError: ``to`` is there already, bad settings, or a training that failed (with the end of its log).
    """
    if to.exists():
        raise UserError("--to", str(to), "is there already; name a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        train_sft("self-report", settings, scratch)
        _save(settings, ShardedState(scratch / f"global_step_{settings.steps}"), scratch / "model")
        (scratch / "model").rename(to)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return to


def _save(settings: WarmUp, after: ShardedState, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto")
    dtype = next(model.parameters()).dtype
    missing, unknown = model.load_state_dict({name: after[name].to(dtype) for name in after}, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    if unknown or set(missing) - tied:
        named = [*unknown, *sorted(set(missing) - tied)][0]
        raise UserError("self-report", named, "the trained weights are not those of this model; is verl as required?")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(folder)
    origin = {
        "model_hash": model_hash(settings.model),
        "lessons": settings.data_hash,
        "steps": settings.steps,
        "lr": settings.lr,
        "batch_size": settings.rows,
        "seed": settings.seed,
        **described(settings.chat),
        "torch": torch.__version__,
    }
    (folder / CARD).write_text(json.dumps(origin, indent=2) + "\n")
