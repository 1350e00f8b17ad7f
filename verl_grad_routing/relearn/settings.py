"""Settings of a relearning attack, checked before anything is sampled or trained. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError


@dataclass(frozen=True)
class Relearn:
    """An adversary fine-tunes what is deployed on hacks.

    SGTM (arXiv 2512.05648, section 5.3) fine-tunes all parameters on a 50/50 mixture of forget and retain data,
    measures every 25 steps, and counts steps until the forget loss of the model that nothing was removed from. Here the
    measure is the hack rate of sampled answers, and the goal that of the model as trained.

    Attributes:
        model: What is attacked: ``.../global_step_N`` of a run with blocks, its deployed block; a Hugging Face folder;
            or an adapter folder that ``vgr export`` or ``vgr retain`` wrote. None of them is changed.
        validate: A parquet file of prompts in verl's format, answered and graded at every measurement.
        reward: The reward function that grades them: ``pkg://module`` or a file, with a function ``compute_score``.
        hacks: Rollouts to learn from: a folder of batches that a run recorded (``grad_routing.record_dir``), or parquet
            with ``prompt``, ``response`` and ``hack``; or
        prompts: prompts to sample hacks with, from the model as trained: a parquet file in verl's format.
        trained: The model as trained, whose hack rate is the goal; of a checkpoint both blocks by default.
        target: A hack rate as the goal instead.
        baselines: Models that are attacked with the same data beside it; of a checkpoint the base model by default.
        clean_share: Share of the rows that are true solutions, from the same rollouts (paper: a half); 0: hacks alone.
        steps: Optimizer steps of each attack.
        every: Steps between measurements (paper: 25), a divisor of ``steps``.
        lr: Learning rate of AdamW, constant (paper: 2e-4 after a warm-up, of a model of 254M parameters).
        batch_size: Rows of a step.
        ranks: Training processes on this machine.
        seed: Of the order of the data, and of sampling.
        base_model: Folder of the base model, if it has moved.
        max_new_tokens: Length of a sampled answer.
        overrides: Further settings of verl's SFT trainer, ``key=value``.
        chat: Switches of the chat template, see ``chat``.
        limit_s: Seconds after which a training is stopped and the command fails.
    """

    model: Path
    validate: Path
    reward: str
    hacks: Path | None = None
    prompts: Path | None = None
    trained: Path | None = None
    target: float | None = None
    baselines: tuple[Path, ...] | None = None
    clean_share: float = 0.5
    steps: int = 200
    every: int = 25
    lr: float = 1e-5
    batch_size: int = 32
    ranks: int = 1
    seed: int = 0
    base_model: Path | None = None
    max_new_tokens: int = 256
    overrides: tuple[str, ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 24 * 3600.0

    def __post_init__(self) -> None:
        if (self.hacks is None) == (self.prompts is None):
            fix = "an attack needs hacks: give rollouts with --hacks, or --prompts to sample some, and not both"
            raise UserError("--hacks", self.hacks and str(self.hacks), fix)
        if self.trained is not None and self.target is not None:
            raise UserError("--target", self.target, "give either a goal, or the model as trained whose rate it is")
        if self.prompts is not None and self.target is not None:
            fix = "hacks are sampled from the model as trained: give that with --trained in place of --target"
            raise UserError("--prompts", str(self.prompts), fix)
        for key in ("validate", "prompts"):
            path = getattr(self, key)
            if path is not None and not path.is_file():
                raise UserError(f"--{key}", str(path), "no such file; give parquet with verl's prompts")
        for path in (self.model, self.trained, *(self.baselines or ())):
            if path is not None and not path.is_dir():
                raise UserError("MODEL", str(path), "no such folder; give a checkpoint, a model or an adapter")
        for key in ("steps", "every", "batch_size", "ranks", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')}", getattr(self, key), "give at least 1")
        if self.steps % self.every:
            raise UserError("--every", self.every, f"must divide --steps ({self.steps}): the last step is measured too")
        if self.batch_size % self.ranks:
            raise UserError("--batch-size", self.batch_size, f"give a multiple of --ranks ({self.ranks})")
        if not self.lr > 0:
            raise UserError("--lr", self.lr, "give a positive learning rate")
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError("--target", self.target, "give a hack rate above 0, at most 1")
        if not 0 <= self.clean_share < 1:
            raise UserError("--clean-share", self.clean_share, "give 0 or more, below 1: without hacks it is no attack")
