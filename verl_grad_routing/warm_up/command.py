"""``vgr warm-up``: train a model for a few steps on clean data; keep the directions it moved in, drop the rest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_grad_routing.chat import described, load_tokenizer, sft_overrides
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces import Basis, basis_of_change, save_basis
from verl_grad_routing.subspaces.basis import model_hash

DATASET = "verl_grad_routing.warm_up.data"
LOG_LINES = 15  # of a trainer that failed


@dataclass(frozen=True)
class WarmUp:
    """Settings of a warm-up. The paper states neither steps nor learning rate nor how much data; all three are ours.

    Attributes:
        model: Folder of the model to start from; it is not changed.
        pairs: Address of contrastive pairs, whose wanted sides are the clean data; or
        data: A parquet file of clean conversations, in verl's SFT format (column ``messages``).
        rank: Directions to keep of every matrix (paper: 1, 5, 10).
        steps: Optimizer steps.
        lr: Learning rate of AdamW, constant.
        batch_size: Rows of a step; ``None`` takes all pairs at once, or 32 conversations.
        ranks: Training processes on this machine.
        seed: Of the order of the data.
        overrides: Further settings of verl's SFT trainer, ``key=value``.
        chat: Switches of the chat template, see ``chat``.
        limit_s: Seconds after which the training is stopped and the command fails.
    """

    model: Path
    pairs: str | None = None
    data: Path | None = None
    rank: int = 10
    steps: int = 20
    lr: float = 1e-4
    batch_size: int | None = None
    ranks: int = 1
    seed: int = 0
    overrides: tuple[str, ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 24 * 3600.0

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise UserError("MODEL", str(self.model), "no config.json there; give a Hugging Face model's folder")
        if (self.pairs is None) == (self.data is None):
            raise UserError("--pairs", self.pairs, "give clean data: either --pairs or --data")
        if self.data is not None and not self.data.is_file():
            raise UserError("--data", str(self.data), "no such file; give parquet with a column `messages`")
        if self.chat and self.data is not None:
            fix = (
                "goes with --pairs: of --data verl's SFT trainer renders every turn alone, where a switch changes more"
            )
            raise UserError("--chat", dict(self.chat), fix)
        for key in ("rank", "steps", "ranks"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key}", getattr(self, key), "give at least 1")
        if not self.lr > 0:
            raise UserError("--lr", self.lr, "give a positive learning rate")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % self.ranks):
            raise UserError("--batch-size", self.batch_size, f"give a positive multiple of --ranks ({self.ranks})")

    @property
    def rows(self) -> int:
        """Rows of a step."""
        if self.batch_size is not None:
            return self.batch_size
        count = len(load_pairs(self.pairs)) if self.pairs is not None else 32
        if count < self.ranks:
            raise UserError("--ranks", self.ranks, f"there are {count} pairs, and each rank needs one; use fewer ranks")
        return count - count % self.ranks

    @property
    def data_hash(self) -> str:
        """Of the clean data."""
        if self.pairs is not None:
            return load_pairs(self.pairs).content_hash
        assert self.data is not None
        return hashlib.sha256(self.data.read_bytes()).hexdigest()

    def arguments(self, folder: Path) -> list[str]:
        """Overrides of verl's SFT configuration."""
        data = [f"data.train_files='{self.pairs}'", f"data.custom_cls.path=pkg://{DATASET}"]
        data += ["data.custom_cls.name=CleanSides"]
        return [
            *(data if self.pairs is not None else [f"data.train_files='{self.data}'"]),
            f"data.train_batch_size={self.rows}",
            "data.num_workers=0",
            f"model.path={self.model}",
            "engine.strategy=fsdp2",
            "engine.use_torch_compile=false",
            f"engine.seed={self.seed}",
            f"optim.lr={self.lr}",
            "optim.weight_decay=0",  # decay moves a matrix along itself, which is no direction of the data
            "optim.lr_scheduler_type=constant",
            "checkpoint.save_contents=[model]",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.total_epochs={self.steps}",
            f"trainer.save_freq={self.steps}",
            "trainer.resume_mode=disable",
            "trainer.logger=[console]",
            f"trainer.n_gpus_per_node={self.ranks}",
            f"trainer.default_local_dir={folder}",
            f"trainer.seed={self.seed}",
            f"hydra.run.dir={folder}/hydra",
            *(["+model.override_config.attn_implementation=sdpa"] if not torch.cuda.is_available() else []),
            *sft_overrides(self.chat),
            *self.overrides,
        ]


def warm_up(settings: WarmUp, to: Path) -> Basis:
    """Train in a scratch folder, write the basis of the change to ``to``, and return it.

    Raises:
        UserError: Bad settings, a training that failed (with the end of its log), or a matrix that did not move.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{to.stem}-", dir=to.parent))
    try:
        train_sft("warm-up", settings, scratch)
        after = ShardedState(scratch / f"global_step_{settings.steps}")
        origin = {
            "model": str(settings.model),
            "model_hash": model_hash(settings.model),
            "data": str(settings.pairs or settings.data),
            "data_hash": settings.data_hash,
            "steps": str(settings.steps),
            "lr": str(settings.lr),
            **described(settings.chat),
        }
        before = _weights(settings.model)
        basis = basis_of_change(
            before, lambda name: after[f"{name}.weight"], linear_modules(settings.model), settings.rank, origin
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    save_basis(basis, to)
    return basis


def train_sft(name: str, settings: WarmUp, folder: Path) -> None:
    """Train as ``settings`` say; the last step is ``folder/global_step_N``. Raises ``UserError`` as ``run_sft``."""
    if settings.chat:
        load_tokenizer(settings.model, settings.chat)  # refuses a switch that the template does not read
    run_sft(name, settings.arguments(folder), settings.ranks, settings.limit_s, folder)


def run_sft(name: str, arguments: Sequence[str], ranks: int, limit_s: float, folder: Path) -> None:
    """verl's SFT trainer with these overrides, its log in ``folder``.

    Raises:
        UserError: It failed (the end of its log goes to stderr), or took longer than ``limit_s``; names ``name``.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, "-m", "verl_grad_routing.warm_up.trainer", *arguments]
    log = folder / "log.txt"
    with log.open("w") as out:
        try:
            status = subprocess.run(command, stdout=out, stderr=out, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            raise UserError(name, limit_s, "not finished within its limit of seconds") from None
    if status != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)
        raise UserError(name, status, "verl's SFT trainer ended with this status; the end of its log is above")


def linear_modules(model: Path) -> list[str]:
    """Names of the linear layers that an adapter on ``all-linear`` reaches: all but the output head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = empty.get_output_embeddings()
    return [name for name, m in empty.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _weights(model: Path) -> Callable[[str], Tensor]:
    """Module name to weight, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    return lambda name: state[f"{name}.weight"]


def describe(basis: Basis, path: Path) -> Sequence[str]:
    """Lines for a terminal: what there is, and how much of the change the kept directions hold."""
    first = [s.values_K[0] / s.values_K.sum() for s in basis.subspaces.values()]
    return [
        f"{path}: {basis.rank} directions of {len(basis.subspaces)} matrices, "
        f"after {basis.origin['steps']} steps on {basis.origin['data']}",
        f"share of the leading direction among those kept: {float(torch.stack(first).mean()):.2f} on average",
    ]
