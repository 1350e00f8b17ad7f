"""``vgr export``: find the checkpoint, write the files beside their destination, check them, put them in place."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.deploy import dense
from verl_grad_routing.deploy.artefact import copy_tokenizer, load_adapted, merge, write_adapter, write_model
from verl_grad_routing.deploy.card import method_facts, removal, render, versions
from verl_grad_routing.deploy.checkpoint import Checkpoint, find_checkpoint, read_json
from verl_grad_routing.deploy.models import (
    adapted_modules,
    check_base,
    load_model,
    recorded_name,
    saved_dtype,
    target_modules,
    training_model,
)
from verl_grad_routing.deploy.rates import read_rates
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.deploy.verify import Difference, compare, largest_difference, limit_for, logits_on, probe_tokens
from verl_grad_routing.envs.manifest import replacing
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import is_zero

FORMATS = ("peft", "hf")
BLOCKS = ("deployed", "both", "quarantine")
QUARANTINE_ALONE = torch.tensor([[0.0, 1.0]])  # forward gate [1, 2], columns deployed and quarantine
EXPORT_FILE = "grad_routing_export.json"


@dataclass(frozen=True)
class Exported:
    """What :func:`export` did.

    Attributes:
        folder: Where the files are.
        format, blocks: What was written.
        difference: Exported model against training model, on logits.
        quarantine_effect: Largest change of a logit that the quarantine makes in the training model.
    """

    folder: Path
    format: str
    blocks: str
    difference: Difference
    quarantine_effect: float


@dataclass(frozen=True)
class _Plan:
    """What to write from where."""

    source: Checkpoint
    format: str
    blocks: str
    base: str
    dtype: torch.dtype
    max_difference: float | None


@dataclass(frozen=True)
class _Trained:
    """The training model, measured: logits as it is to be exported, and what is needed to write it."""

    weights: dict[str, Tensor]
    targets: list[str]
    probes: list[Tensor]
    logits: list[Tensor]
    quarantine_effect: float
    checks: list[str]


def export(
    checkpoint: Path,
    to: Path,
    format: str = "peft",
    blocks: str | None = None,
    base_model: str | None = None,
    max_difference: float | None = None,
    run: Path | None = None,
    force: bool = False,
) -> Exported:
    """Write what is deployed of a checkpoint, as files that plain transformers, PEFT and vLLM load.

    Nothing is written unless the exported model's logits are the training model's, with the quarantine ablated
    for ``deployed``: both are loaded and run on random tokens, in float32 on the CPU.

    Args:
        checkpoint: ``.../global_step_N``, its ``actor`` folder, or the folder of all steps (then the latest).
        to: New or empty folder, or one that an earlier export wrote (with ``force``).
        format: ``peft``: an adapter folder, float32. ``hf``: a merged model in the base model's dtype; the one format
            of dense blocks.
        blocks: ``deployed``: the deployed block alone. ``both``: as trained. ``quarantine``: that block alone, the
            block-swap control, of adapters only. ``None``: as the run's ``ablate_at_deployment`` says.
        base_model: Folder or hub name of the base model; by default the one that the checkpoint names.
        max_difference: Largest logit difference, instead of the limit that ``deploy.verify`` documents.
        run: Folder of the run, whose validation rollouts give the model card its rates.
        force: Replace an earlier export.

    Raises:
        UserError: Anything of the above is missing, does not fit, or is not what was trained.
    """
    _check_choice("format", format, FORMATS)
    _check_choice("blocks", blocks, (None, *BLOCKS))
    _check_destination(to, force)
    source = find_checkpoint(checkpoint)
    blocks = str(blocks or source.layout.default_blocks)
    rates = read_rates(run, source.step, source.layout.ablate_at_deployment) if run is not None else {}
    base = recorded_name(base_model or source.layout.base_model)
    kind = source.layout.kind
    if (kind, format) not in _WRITERS:
        fix = f"blocks of the kind {kind!r} are exported as {' or '.join(f for k, f in _WRITERS if k == kind)}"
        raise UserError("format", format, fix)
    if (kind, blocks) == ("dense", "quarantine"):
        fix = "units of the base model are no model by themselves; give deployed or both"
        raise UserError("blocks", blocks, fix)
    dtype = saved_dtype(base) if format == "hf" else torch.float32
    plan = _Plan(source, format, blocks, base, dtype, max_difference)
    trained = _MEASURES[kind](plan)
    print("\n".join(trained.checks))
    with replacing(to) as folder:
        difference = _WRITERS[kind, format](folder, plan, trained)
        print(difference)
        if not copy_tokenizer(source.actor, folder):
            print(f"no tokenizer in {source.actor / 'huggingface'}: take the base model's")
        facts = _facts(plan, trained, difference)
        (folder / "README.md").write_text(render(facts, source.settings, rates), encoding="utf-8")
        facts["files"] = sorted([EXPORT_FILE, *(path.name for path in folder.iterdir())])
        (folder / EXPORT_FILE).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"{format} export of step {source.step}, {blocks}: {to}")
    return Exported(to, format, blocks, difference, trained.quarantine_effect)


def _check_choice(key: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise UserError(key, value, f"give one of {', '.join(str(choice) for choice in choices if choice)}")


def _check_destination(to: Path, force: bool) -> None:
    if not to.exists():
        return
    if not to.is_dir():
        raise UserError("to", str(to), "is a file; name a new or empty folder")
    present = {path.name for path in to.iterdir()}
    if not present:
        return
    if EXPORT_FILE not in present:
        raise UserError("to", str(to), "is not empty and no earlier export; name a new or empty folder")
    foreign = sorted(present - set(read_json(to / EXPORT_FILE).get("files", ())))
    if foreign:
        raise UserError("to", str(to / foreign[0]), "not part of the earlier export there; move it away")
    if not force:
        raise UserError("to", str(to), "holds an earlier export; name another folder, or replace it with force")


def _measure(plan: _Plan) -> _Trained:
    state = ShardedState(plan.source.actor)
    adapters = {name: state[name].float() for name in state if ".lora_" in name}
    base = load_model(plan.base)
    compared = check_base(base, state, plan.base)
    targets = target_modules(base, adapted_modules(adapters))
    model, context = training_model(base, plan.source.layout, adapters)
    probes = probe_tokens(model)
    logits = {}
    for blocks in dict.fromkeys(("deployed", "both", plan.blocks)):
        context.ablated = blocks == "deployed"
        context.set(QUARANTINE_ALONE if blocks == "quarantine" else None, None)
        logits[blocks] = logits_on(model, probes)
    effect = largest_difference(logits["deployed"], logits["both"])
    empty = is_zero(adapters, "quarantine")
    checks = [_base_check(compared), _effect_check(effect, limit_for(torch.float32, logits["both"]), empty)]
    return _Trained(adapters, targets, probes, logits[plan.blocks], effect, checks)


def _base_check(compared: int) -> str:
    if compared == 0:
        return "base model: taken as named, the checkpoint holds adapters only"
    return f"base model: all {compared} frozen tensors of the checkpoint are its own"


def _effect_check(effect: float, limit: float, empty: bool) -> str:
    if empty:
        return "the quarantine is zero: deployed and both are the same model"
    if effect <= limit:
        return f"the quarantine moves the logits by up to {effect:.3g} only: logits hardly tell deployed from both"
    return f"the quarantine moves the logits by up to {effect:.3g}: deployed and both differ"


def _write_adapter(folder: Path, plan: _Plan, trained: _Trained) -> Difference:
    write_adapter(folder, trained.weights, plan.source.layout, plan.blocks, plan.base, trained.targets)
    adapted = load_adapted(plan.base, folder)
    return compare(trained.logits, logits_on(adapted, trained.probes), plan.dtype, plan.max_difference)


def _write_merged(folder: Path, plan: _Plan, trained: _Trained) -> Difference:
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(Path(scratch), trained.weights, plan.source.layout, plan.blocks, plan.base, trained.targets)
        merged = merge(load_adapted(plan.base, Path(scratch)))
    if plan.dtype != torch.float32:
        exact = compare(trained.logits, logits_on(merged, trained.probes))
        trained.checks.append(f"merged in float32, before rounding to {dtype_name(plan.dtype)}: {exact}")
        print(trained.checks[-1])
    written = write_model(folder, merged, plan.dtype)
    return compare(trained.logits, logits_on(written, trained.probes), plan.dtype, plan.max_difference)


def _measure_dense(plan: _Plan) -> _Trained:
    trained = dense.measure(plan.source, plan.base)
    effect = largest_difference(trained.logits["deployed"], trained.logits["both"])
    checks = [
        f"all {len(trained.weights)} weights are the checkpoint's; architecture and configuration are the base model's",
        _effect_check(effect, limit_for(torch.float32, trained.logits["both"]), effect == 0),
    ]
    return _Trained(trained.weights, [], trained.probes, trained.logits[plan.blocks], effect, checks)


def _write_dense(folder: Path, plan: _Plan, trained: _Trained) -> Difference:
    model = dense.plain_model(plan.source, plan.base, trained.weights, ablate=plan.blocks == "deployed")
    written = write_model(folder, model, plan.dtype)  # type: ignore[arg-type]
    return compare(trained.logits, logits_on(written, trained.probes), plan.dtype, plan.max_difference)


_MEASURES = {"adapters": _measure, "dense": _measure_dense}
_WRITERS = {
    ("adapters", "peft"): _write_adapter,
    ("adapters", "hf"): _write_merged,
    ("dense", "hf"): _write_dense,
}


def _facts(plan: _Plan, trained: _Trained, difference: Difference) -> dict[str, Any]:
    layout = plan.source.layout
    return {
        "format": plan.format,
        "blocks": plan.blocks,
        "dtype": dtype_name(plan.dtype),
        "step": plan.source.step,
        "base_model": plan.base,
        **layout.facts(plan.blocks),
        "rows": layout.rows(),
        "method": method_facts(plan.source),
        "quarantine": removal(plan.blocks, layout.ablate_at_deployment, layout.removed),
        "max_difference": difference.maximum,
        "limit": difference.limit,
        "quarantine_effect": trained.quarantine_effect,
        "checks": [*trained.checks, str(difference)],
        "versions": versions(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
