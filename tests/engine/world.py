"""What a process of a world does with a real engine: build it, feed it verl's batches, read its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from tests.engine.rollouts import ALPHA, PLAIN, RANKS, Inputs, Loss, Rollout
from verl_grad_routing.routing import DEFAULT, block_of
from verl_grad_routing.training.engine import RoutedFSDPEngine
from verl_grad_routing.training.engine_config import RoutedFSDPEngineConfig

SCENARIOS: dict[str, tuple[Callable[[World], Any], tuple[int, ...]]] = {}


def scenario(*sizes: int):
    """Register a function of a ``World``; it runs in worlds of these sizes and its rank 0 result reaches the tests."""

    def decorate(function: Callable[[World], Any]):
        SCENARIOS[function.__name__] = (function, sizes)
        return function

    return decorate


@dataclass
class World:
    """One process of a world."""

    rank: int
    size: int
    inputs: Inputs
    scratch: Path

    @property
    def rollouts(self) -> list[Rollout]:
        return self.inputs.rollouts

    def engine(
        self,
        ranks: str = "equal",
        *,
        checkpointing: bool = False,
        merge: bool = False,
        dtype: str = "fp32",
        blocks: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        fsdp: Mapping[str, Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Tensor] | None = None,
        as_initialised: bool = False,
    ) -> RoutedFSDPEngine:
        """A fresh engine, built as verl's worker builds it, with the inputs' adapters (or ``adapters``) in it.

        With ``as_initialised`` it keeps the adapters that it starts with.
        """
        deployed, quarantine = RANKS[ranks]
        dense = (blocks or {}).get("kind") == "dense"
        model = HFModelConfig(
            path=str(self.inputs.model_dir),
            load_tokenizer=False,
            lora_rank=0 if dense else deployed + quarantine,
            lora_alpha=ALPHA,
            lora={"merge": merge},
            enable_gradient_checkpointing=checkpointing,
            override_config={"attn_implementation": "sdpa"},
        )
        config = RoutedFSDPEngineConfig(
            strategy="fsdp2",
            blocks={"deployed_rank": deployed, "quarantine_rank": quarantine, **(blocks or {})},
            use_torch_compile=False,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            **(fsdp or {}),
        )
        object.__setattr__(config, "strategy", "routed_fsdp2")  # the actor's configuration hands its own on like this
        optimizer = FSDPOptimizerConfig(
            **{"lr": 1e-2, "weight_decay": 0.1, "total_training_steps": 100, **(optim or {})}
        )
        engine = EngineRegistry.new(
            model_type="language_model",
            backend="routed_fsdp2",
            model_config=model,
            engine_config=config,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(**(checkpoint or {})),
        )
        assert isinstance(engine, RoutedFSDPEngine)
        engine.initialize()
        if not (as_initialised or dense):
            fill(engine, self.inputs.adapters[ranks] if adapters is None else adapters)
        return engine

    def mine(self, rows: Sequence[Rollout]) -> list[Rollout]:
        """This rank's share: every ``size``-th row."""
        return list(rows[self.rank :: self.size])

    def train(self, engine: RoutedFSDPEngine, rows: Sequence[Rollout], loss: Loss = PLAIN, **options: Any) -> dict:
        """One ``train_batch`` over the global mini-batch ``rows``; returns its metrics."""
        with engine.train_mode():
            output = engine.train_batch(batch(self.mine(rows), len(rows), loss, **options), actor_loss(loss))
        return {key: value[0] if isinstance(value, list) else value for key, value in output["metrics"].items()}

    def gradients(self, engine: RoutedFSDPEngine, rows: Sequence[Rollout], loss: Loss = PLAIN, **options: Any) -> dict:
        """Full gradients of both blocks before clipping; the engine is left as it was."""
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(batch(self.mine(rows), len(rows), loss, **options), actor_loss(loss))
            return {name: full(p.grad) for name, p in adapters_of(engine).items() if p.grad is not None}

    def infer(self, engine: RoutedFSDPEngine, rows: Sequence[Rollout], **options: Any) -> dict[str, list[Tensor]]:
        """Model outputs of every row of ``rows``, in that order, log-probs cut to the response."""
        own = self.mine(rows)
        with engine.eval_mode():
            output = engine.infer_batch(batch(own, len(rows), **options))["model_output"]
        found = {key: list(value.unbind()) for key, value in output.items()}
        cuts = [slice(len(row.prompt) - 1, len(row.tokens) - 1) for row in own]
        found["log_probs"] = [value[cut] for value, cut in zip(found["log_probs"], cuts, strict=True)]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, found)
        return {key: [everyone[i % self.size][key][i // self.size] for i in range(len(rows))] for key in found}


def batch(
    rows: Sequence[Rollout],
    total: int,
    loss: Loss = PLAIN,
    *,
    packed: bool = True,
    micro: int | None = None,
    max_tokens: int | None = None,
    table: Any = DEFAULT,
    weighted: bool = False,
    confessing: bool = False,
    sampled: bool = False,
    **extra: Any,
) -> TensorDict:
    """verl's no-padding batch of ``rows`` out of a global mini-batch of ``total`` rows.

    Args:
        micro: Rows of a micro-batch; all of them unless given.
        max_tokens: Dynamic micro-batches of at most so many tokens instead.
        table: ``None`` leaves routes and table out, as a plain inference batch does.
        sampled: With the column that tells which rows were sampled with the quarantine off.
    """

    def jagged(values: Sequence[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    tensors: dict[str, Any] = {
        "input_ids": jagged([row.tokens for row in rows]),
        "position_ids": jagged([torch.arange(len(row.tokens)) for row in rows]),
        "prompts": jagged([row.prompt for row in rows]),
        "responses": jagged([row.response for row in rows]),
        "response_mask": jagged([row.mask for row in rows]),
        "loss_mask": jagged([row.mask for row in rows]),
        "old_log_probs": jagged([row.old_log_probs for row in rows]),
        "ref_log_prob": jagged([row.ref_log_probs for row in rows]),
        "advantages": jagged([row.advantages for row in rows]),
    }
    settings: dict[str, Any] = {
        "use_remove_padding": packed,
        "use_dynamic_bsz": max_tokens is not None,
        "use_fused_kernels": False,
        "temperature": loss.temperature,
        "calculate_entropy": bool(loss.entropy),
        "global_batch_size": total,
        **extra,
    }
    settings |= {"micro_batch_size_per_gpu": micro or len(rows)} if max_tokens is None else {}
    settings |= {"max_token_len_per_gpu": max_tokens} if max_tokens is not None else {}
    if table is not None:
        tensors["route"] = torch.tensor([row.route for row in rows])
        settings["routing_table"] = table
    if any(row.token_routes is not None for row in rows):
        tensors["token_route"] = jagged([torch.tensor(row.token_routes) for row in rows])
    if any(row.token_weights is not None for row in rows):
        tensors["token_weight"] = jagged([torch.tensor(row.token_weights) for row in rows])
    if confessing:
        tensors["confession"] = torch.tensor([-1 if row.padding else int(row.confession) for row in rows])
    if weighted:
        tensors["route_weight"] = torch.tensor([row.weight for row in rows])
    if sampled:
        tensors["quarantine_off"] = torch.tensor([int(row.off) for row in rows])
    return tu.get_tensordict(tensors, settings)


def actor_loss(loss: Loss) -> Callable:
    """verl's own PPO loss, as its worker hands it to the engine."""
    config = ActorConfig(
        strategy="routed_fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=loss.aggregation,
        use_kl_loss=bool(loss.kl),
        kl_loss_coef=loss.kl,
        entropy_coeff=loss.entropy,
        use_torch_compile=False,
    )
    return partial(ppo_loss, config=config)


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor (every rank takes part)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def adapters_of(engine: Any) -> dict[str, torch.nn.Parameter]:
    """What trains: the adapters' parameters, or all of them where blocks are dense."""
    dense = engine.blocks_config.kind == "dense"
    return {name: p for name, p in engine.module.named_parameters() if dense or block_of(name) is not None}


@torch.no_grad()
def fill(engine: Any, values: Mapping[str, Tensor]) -> None:
    parameters = adapters_of(engine)
    assert parameters.keys() == values.keys()
    for name, p in parameters.items():
        assert isinstance(p, DTensor)
        p.copy_(distribute_tensor(values[name].to(p.dtype), p.device_mesh, p.placements))


def parameters(engine: Any) -> dict[str, Tensor]:
    """Both blocks' full parameters."""
    return {name: full(p) for name, p in adapters_of(engine).items()}


def state(engine: Any) -> dict[str, Tensor]:
    """Everything that training may move: ``parameter`` and ``parameter/optimizer key`` -> full tensor."""
    found = parameters(engine)
    for name, p in adapters_of(engine).items():
        found |= {f"{name}/{key}": full(torch.as_tensor(v)) for key, v in engine.optimizer.state.get(p, {}).items()}
    return found
