"""Checkpoints as verl writes them: FSDP2 over a fake process group, saved by verl's own checkpoint manager."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from verl_grad_routing.deploy.verify import logits_on, probe_tokens
from verl_grad_routing.routing import add_blocks, block_parameters

SCALING = 1.5


@dataclass(frozen=True)
class Run:
    """A checkpoint, and what the model that was saved into it computes."""

    checkpoint: Path  # .../global_step_3
    base: Path
    probes: list[Tensor]
    logits: dict[str, list[Tensor]]  # by blocks


def _base(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=40)
    config.initializer_range = 0.2
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(ord("a") + index): index for index in range(26)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters, unk_token="a")), unk_token="a")


def _adapted(base: LlamaForCausalLM, deployed: float, quarantine: float, exclude: str | None, form: str):
    model, context = add_blocks(
        base,
        deployed_rank=3,
        quarantine_rank=5,
        scaling=SCALING,
        target_modules="all-linear",
        exclude_modules=exclude,
        form=form,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block, parameters in block_parameters(model).items():
            for p in parameters:
                p.copy_(torch.randn(p.shape, generator=generator) * (deployed if block == "deployed" else quarantine))
    return model.eval(), context


def _save(model, actor: Path, rank: int, mesh_shape: tuple[int, ...], adapters_only: bool) -> None:
    """One rank's part of the checkpoint; sharding and saving need no communication."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from verl.trainer.config import CheckpointConfig
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    world = torch.Size(mesh_shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        names = ("fsdp",) if len(mesh_shape) == 1 else ("ddp", "fsdp")
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        config = CheckpointConfig(save_lora_only=adapters_only)
        FSDPCheckpointManager(
            model, optimizer, processing_class=_tokenizer(), checkpoint_config=config
        ).save_checkpoint(str(actor), global_step=3)
    finally:
        dist.destroy_process_group()


def _ours(checkpoint: Path, base: Path, ablate: bool, form: str) -> None:
    """The files that the routed engine and trainer add."""
    layout = {
        "deployed_rank": 3,
        "quarantine_rank": 5,
        "scaling": SCALING,
        "init": "random_orthogonal",
        "ablate_at_deployment": ablate,
        "base_model": str(base),
        "target_modules": ["all of them"],
        **({} if form == "lora" else {"form": form}),  # earlier checkpoints say nothing of it
    }
    (checkpoint / "actor" / "grad_routing_blocks.json").write_text(json.dumps(layout))
    direction = {"vectors_Ld": torch.zeros(1, 32), "layers": (2,), "pairs_hash": "0123abcd", "held_out_accuracy": 0.9}
    state = {"detector": {"name": "persona_act", "direction": direction}, "gate": {"name": "history_quantile"}}
    torch.save(state, checkpoint / "grad_routing.pt")
    settings = {
        "preset": "persona",
        "control": False,
        "seed": 11,
        "blocks": {"seed": 12},
        "detector": {"name": "persona_act", "pairs": "pairs.jsonl", "seed": 13},
        "gate": {"name": "history_quantile", "route": 0.75},
        "intervention": {"name": "route", "strict": False},
    }
    (checkpoint / "grad_routing.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def make_run(tmp_path_factory) -> Callable[..., Run]:
    """``make_run(mesh=(2,), dtype=..., quarantine=0.2, ablate=True, adapters_only=False, exclude=None,
    form="lora", deployed=0.2)``."""

    def make(
        mesh: tuple[int, ...] = (1,),
        dtype: torch.dtype = torch.float32,
        quarantine: float = 0.2,
        ablate: bool = True,
        adapters_only: bool = False,
        exclude: str | None = None,
        form: str = "lora",
        deployed: float = 0.2,
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        base, checkpoint = folder / "base", folder / "ckpt" / "global_step_3"
        model, context = _adapted(_base(base, dtype), deployed, quarantine, exclude, form)
        probes = probe_tokens(model)
        logits = {}
        for name in ("deployed", "both"):
            context.ablated = name == "deployed"
            logits[name] = logits_on(model, probes)
        for rank in range(torch.Size(mesh).numel()):
            model, _ = _adapted(_base(base, dtype), deployed, quarantine, exclude, form)
            _save(model, checkpoint / "actor", rank, mesh, adapters_only)
        _ours(checkpoint, base, ablate, form)
        (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("3")
        return Run(checkpoint, base, probes, logits)

    return make


@pytest.fixture(scope="session")
def run(make_run) -> Run:
    """Two ranks, sharded unevenly; float32. Read only."""
    return make_run(mesh=(2,))


DENSE_UNITS = [0, 1, 2, 9]


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def dense_checkpoint(request, tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A run's last checkpoint, units of the model itself being the quarantine, and the trained model."""
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        attention_bias=True,
        tie_word_embeddings=request.param,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    torch.manual_seed(1)
    trained = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    actor = folder / "global_step_3" / "actor"
    actor.mkdir(parents=True)
    torch.save(trained.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": 1}))
    layout = {
        "kind": "dense",
        "units": {"layers": [1], "mlp_units": DENSE_UNITS, "heads": [2, 3]},
        "shared": ["embeddings", "head"],
        "ablate_at_deployment": True,
        "base_model": str(folder / "base"),
    }
    (actor / "grad_routing_blocks.json").write_text(json.dumps(layout))
    return actor.parent, trained
