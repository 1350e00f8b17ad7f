"""Settings of a rejection fine-tuning, checked before anything is sampled. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError

FILTERS = ("grift", "permuted", "none")
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Rft:
    """Settings of ``vgr rft``; the paper's are those of its BigMath code.

    Attributes:
        model: Hugging Face folder to sample from and to fine-tune: an intermediate checkpoint, exported.
        data: Prompts, a parquet file in verl's format.
        detector: Settings of detector ``grift``: who labels its clusters (``rules``, ``judge``, or
            ``label_by: gt_anchor``, a control), and whatever else.
        filter: ``grift``; ``permuted``: its scores permuted among the correct responses, the control that says what a
            filter of that size is worth; ``none``: every correct response, plain rejection fine-tuning.
        reward: ``module:function`` with the signature of verl's custom reward function; ``None``: the environment's
            that the data's ``data_source`` names.
        positive_reward: A response with at least this reward is correct, for all that the reward knows.
        prompts: How many of the data's prompts, from its first (paper: 2048); ``None``: all.
        samples: Responses to each prompt.
        temperature: 0 is greedy (paper), so one sample.
        max_tokens: Length limit of a response.
        keep: At most so many responses, of lowest score first (paper: 1000).
        lr: Peak learning rate of AdamW, cosine (paper: 1e-5).
        epochs: Passes over what is kept (paper: 1).
        batch_size: Rows of a step (paper: 2 by 8).
        full_text: Prompts are learned as well (paper); ``False``: responses alone.
        engine: What samples: ``transformers``, or ``vllm`` where it is installed.
        ranks: Training processes on this machine.
        seed: Of sampling, of the permutation, of the order of the data.
        overrides: Further settings of verl's SFT trainer, ``key=value``.
        chat: Switches of the chat template, see ``chat``.
        limit_s: Seconds after which the training is stopped and the command fails.
    """

    model: Path
    data: Path
    detector: Mapping[str, Any] = field(default_factory=dict)
    filter: str = "grift"
    reward: str | None = None
    positive_reward: float = 1.0
    prompts: int | None = 2048
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 1024
    keep: int = 1000
    lr: float = 1e-5
    epochs: int = 1
    batch_size: int = 16
    full_text: bool = True
    engine: str = "transformers"
    ranks: int = 1
    seed: int = 0
    overrides: tuple[str, ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 24 * 3600.0

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            fix = "no config.json there; give a Hugging Face model's folder (vgr export --format hf writes one)"
            raise UserError("MODEL", str(self.model), fix)
        if not self.data.is_file():
            raise UserError("--data", str(self.data), "no such file; give parquet in verl's format")
        for key, options in (("filter", FILTERS), ("engine", ENGINES)):
            if getattr(self, key) not in options:
                raise UserError(f"--{key}", getattr(self, key), f"choose one of {', '.join(options)}")
        for key in ("samples", "max_tokens", "keep", "epochs", "batch_size", "ranks"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')}", getattr(self, key), "give at least 1")
        if self.prompts is not None and self.prompts < 1:
            raise UserError("--prompts", self.prompts, "give at least 1")
        if self.temperature < 0 or (self.temperature == 0 and self.samples > 1):
            fix = "greedy responses to one prompt are equal: give a positive temperature, or one sample"
            raise UserError("--temperature", self.temperature, fix)
        if not self.lr > 0:
            raise UserError("--lr", self.lr, "give a positive learning rate")
        if self.batch_size % self.ranks:
            raise UserError("--batch-size", self.batch_size, f"give a multiple of --ranks ({self.ranks})")
