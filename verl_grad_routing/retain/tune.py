"""``vgr retain``: export the deployed block, fine-tune it on clean data, measure the model without and with that.

Ablation may take something useful along; a few steps on clean data bring it back. Cloud et al. (arXiv 2410.04332, the
language model of expand, route, ablate) take at most 40 steps at 5e-5 on 64 retain stories and keep the best; the
defaults here are their steps and rate, and the last step is kept. Every table shows the model without the fine-tune
beside the one with it: it also moves what was to be removed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from verl_grad_routing.deploy.checkpoint import find_checkpoint
from verl_grad_routing.deploy.exporter import export
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.envs.manifest import replacing
from verl_grad_routing.errors import UserError
from verl_grad_routing.retain.kinds import KINDS
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
        chat: Switches of the chat template, see ``chat``.
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
    chat: Mapping[str, Any] = field(default_factory=dict)
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

    def training(self, start: Path, own: Sequence[str]) -> WarmUp:
        """The training of the model in the folder ``start`` by verl's SFT trainer, with its ``own`` settings."""
        settings = {"steps": self.steps, "lr": self.lr, "batch_size": self.batch_size, "ranks": self.ranks}
        overrides = (*own, *self.overrides)
        shared = {"seed": self.seed, "overrides": overrides, "chat": self.chat, "limit_s": self.limit_s}
        return WarmUp(start, self.pairs, self.data, rank=1, **shared, **settings)


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
    """Write ``without/`` and ``with/`` and ``retain.json`` into the new folder ``to``.

    Both are plain PEFT adapters, or plain models where blocks are units of the model.

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
    settings.training(base, ())  # bad settings end here
    rows, kind = check_rows(settings, base), KINDS[source.layout.kind]
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as folder, tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        without = folder / "without"
        export(settings.checkpoint, without, kind.format, "deployed", str(base))
        training = settings.training(kind.start(base, without), kind.overrides(without, source.layout))
        train_sft("retain", training, Path(scratch))
        kind.write(ShardedState(Path(scratch) / f"global_step_{settings.steps}"), without, folder / "with")
        measured = {part: measure(kind.load(base, folder / part), base, rows, settings) for part in PARTS}
        facts = {**_origin(settings, training), **{part: found.as_dict() for part, found in measured.items()}}
        (folder / REPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        done = Retained(to, measured)
        _describe(folder, facts, done.lines())
    return done


def _origin(settings: Retain, training: WarmUp) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return {"settings": plain, "rows_of_a_step": training.rows, "data_hash": training.data_hash}


def _describe(folder: Path, facts: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Put the fine-tune, and the numbers without and with it, at the end of the model card."""
    card = folder / "with" / "README.md"
    settings = facts["settings"]
    text = (
        f"\n## Retain fine-tune\n\nAfter the quarantine was deleted this model was trained for {settings['steps']} "
        f"steps at a learning rate of {settings['lr']:g} on clean data ({settings['pairs'] or settings['data']}, "
        f"{facts['rows_of_a_step']} rows a step, SHA-256 {facts['data_hash']}). What is said above was checked before "
        "that. The model without the fine-tune is in the folder `without` beside this one.\n\n"
    )
    card.write_text(card.read_text(encoding="utf-8") + text + "```\n" + "\n".join(lines) + "\n```\n", encoding="utf-8")
