"""``vgr retain``: export the deployed block, fine-tune it on clean data, measure the model without and with that.

Ablation may take something useful along; a few steps on clean data bring it back. Cloud et al. (arXiv 2410.04332, the
language model of expand, route, ablate) take at most 40 steps at 5e-5 on 64 retain stories and keep the best; the
defaults here are their steps and rate, and the last step is kept. Every table shows the model without the fine-tune
beside the one with it: it also moves what was to be removed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from verl_grad_routing.deploy.artefact import ADAPTER_FILE
from verl_grad_routing.deploy.checkpoint import find_checkpoint
from verl_grad_routing.deploy.exporter import export
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.envs.manifest import replacing
from verl_grad_routing.errors import UserError
from verl_grad_routing.retain.measure import Measured, check_rows, measure
from verl_grad_routing.warm_up.command import WarmUp, train_sft

REPORT = "retain.json"
PARTS = ("without", "with")


@dataclass(frozen=True)
class Retain:
    """Settings of a fine-tune after ablation.

    Attributes:
        checkpoint: ``.../global_step_N`` of a run with blocks; it is not changed.
        pairs: Address of contrastive pairs, whose wanted sides are the clean data; or
        data: A parquet file of clean conversations, in verl's SFT format (column ``messages``).
        steps: Optimizer steps.
        lr: Learning rate of AdamW, constant.
        batch_size: Rows of a step; ``None`` takes all pairs at once, or 32 conversations.
        ranks: Training processes on this machine.
        seed: Of the order of the data, and of the sampled validation.
        base_model: Folder of the base model; by default the one that the checkpoint names.
        validate: A parquet file of prompts in verl's format, to sample from both models and grade; or none.
        reward: The reward function that grades them: ``pkg://module`` or a file, with a function ``compute_score``.
        max_new_tokens: Length of a sampled answer.
        overrides: Further settings of verl's SFT trainer, ``key=value``.
        limit_s: Seconds after which the training is stopped and the command fails.
    """

    checkpoint: Path
    pairs: str | None = None
    data: Path | None = None
    steps: int = 40
    lr: float = 5e-5
    batch_size: int | None = None
    ranks: int = 1
    seed: int = 0
    base_model: Path | None = None
    validate: Path | None = None
    reward: str | None = None
    max_new_tokens: int = 256
    overrides: tuple[str, ...] = ()
    limit_s: float = 24 * 3600.0

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.data is None):
            raise UserError("--pairs", self.pairs, "a retain fine-tune needs clean data: give either --pairs or --data")
        if (self.validate is None) != (self.reward is None):
            raise UserError("--reward", self.reward, "give --validate and --reward together, or neither")
        if self.validate is not None and not self.validate.is_file():
            raise UserError("--validate", str(self.validate), "no such file; give parquet with verl's prompts")
        if self.max_new_tokens < 1:
            raise UserError("--max-new-tokens", self.max_new_tokens, "give at least 1")

    def training(self, base: Path, adapter: Path, layout: Any) -> WarmUp:
        """The training of the adapter in the folder ``adapter``, as verl's SFT trainer takes it."""
        own = (
            f"model.lora_adapter_path={adapter}",
            f"model.lora_rank={layout.adapter_rank('deployed')}",
            f"model.lora_alpha={layout.scaling * layout.adapter_rank('deployed')}",
            *self.overrides,
        )
        settings = {"steps": self.steps, "lr": self.lr, "batch_size": self.batch_size, "ranks": self.ranks}
        return WarmUp(
            base, self.pairs, self.data, seed=self.seed, overrides=own, limit_s=self.limit_s, rank=1, **settings
        )


@dataclass(frozen=True)
class Retained:
    """What :func:`retain` wrote, and its two models' numbers by ``without`` and ``with``."""

    folder: Path
    measured: Mapping[str, Measured]

    def lines(self) -> list[str]:
        """A table for a terminal: one column a model."""
        columns = {name: dict(found.rows()) for name, found in self.measured.items()}
        names = list(columns["without"])
        width = max(map(len, names))
        head = f"{'':<{width}}  {'without fine-tune':<36}  with fine-tune"
        return [head, *(f"{name:<{width}}  {columns['without'][name]:<36}  {columns['with'][name]}" for name in names)]


def retain(settings: Retain, to: Path) -> Retained:
    """Write ``without/`` and ``with/``, plain PEFT adapters, and ``retain.json`` into the new folder ``to``.

    Raises:
        UserError: No clean data, a run that ablates nothing, a base model that is no folder, a training that failed
            (with the end of its log), or one that moved nothing.
    """
    if to.exists() and any(to.iterdir()):
        raise UserError("--to", str(to), "is not empty; name a new or empty folder")
    source = find_checkpoint(settings.checkpoint)
    if not source.layout.ablate_at_deployment:
        fix = "the run deploys both blocks (ablate_at_deployment: false), so there is no ablation to recover from"
        raise UserError("CHECKPOINT", str(settings.checkpoint), fix)
    base = Path(settings.base_model or source.layout.base_model).expanduser().resolve()
    training = settings.training(base, Path("adapter"), source.layout)  # bad settings end here
    rows = check_rows(settings, base)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as folder, tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        export(settings.checkpoint, folder / "without", "peft", "deployed", str(base))
        training = settings.training(base, folder / "without", source.layout)
        train_sft("retain", training, Path(scratch))
        _write_tuned(ShardedState(Path(scratch) / f"global_step_{settings.steps}"), folder)
        measured = {part: measure(base, folder / part, rows, settings) for part in PARTS}
        facts = {**_origin(settings, training), **{part: found.as_dict() for part, found in measured.items()}}
        (folder / REPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        done = Retained(to, measured)
        _describe(folder, facts, done.lines())
    return done


def _write_tuned(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """The trained adapter beside the one that it started from, with the same configuration and tokenizer."""
    shutil.copytree(folder / "without", folder / "with", ignore=shutil.ignore_patterns("grad_routing_export.json"))
    before = load_file(folder / "without" / ADAPTER_FILE)
    names = {name: name.replace(".weight", ".default.weight") for name in before}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise UserError("retain", missing[0], "verl's SFT trainer did not save this parameter of the adapter")
    after = {name: state[saved].float().contiguous() for name, saved in names.items()}
    if all(torch.equal(after[name], tensor) for name, tensor in before.items()):
        raise UserError("--lr", "nothing moved", "the fine-tune left the adapter as it was; raise lr or steps")
    save_file(after, folder / "with" / ADAPTER_FILE, metadata={"format": "pt"})


def _origin(settings: Retain, training: WarmUp) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return {"settings": plain, "rows_of_a_step": training.rows, "data_hash": training.data_hash}


def _describe(folder: Path, facts: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Put the fine-tune, and the numbers without and with it, at the end of the model card."""
    card = folder / "with" / "README.md"
    settings = facts["settings"]
    text = (
        f"\n## Retain fine-tune\n\nAfter the quarantine was deleted this adapter was trained for {settings['steps']} "
        f"steps at a learning rate of {settings['lr']:g} on clean data ({settings['pairs'] or settings['data']}, "
        f"{facts['rows_of_a_step']} rows a step, SHA-256 {facts['data_hash']}). What is said above was checked before "
        "that. The model without the fine-tune is in the folder `without` beside this one.\n\n"
    )
    card.write_text(card.read_text(encoding="utf-8") + text + "```\n" + "\n".join(lines) + "\n```\n", encoding="utf-8")
