"""What routing costs in a training step: ``persona`` against ``vanilla_2r`` on verl's real engine, one process.

Both arms use the same engine, weights and batch: the embedded environment's model and batch (128 rollouts, KL reference
on). ``update`` is one ``update_actor``. ``step`` is everything a step computes outside generation: log-probs, reference
log-probs (with the scores read in that pass), the gate, and the update, in which KEEP rollouts take their old log-probs
from the update itself, as in every on-policy step of one mini-batch. Generation and weight
sync cost the same in both arms, so the ratio of a whole step with them is nearer to 1 than the one printed here.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from verl_grad_routing.bench.memory import keep_freed_memory
from verl_grad_routing.bench.statistics import interleave, ratio_interval
from verl_grad_routing.gates import GATES
from verl_grad_routing.routing import DEFAULT, Route, RoutingTable

ROLLOUTS, PROMPT, RESPONSE, MICRO = 128, 13, 6, 64
LAYERS_READ = (2, 3)
CPU_THREADS = 1


class Bench:
    """An engine, a batch, and the passes of a step over them."""

    def __init__(self, folder: Path, kl: bool, joined: bool = False):
        self.kl, self.folder = kl, folder
        if not joined:
            prepare(folder)
        self.engine = build_engine(folder, BLOCKS)
        self.loss = make_loss(kl)
        self.batch = make_batch(kl)
        self.gate = GATES.build({"name": "history_quantile", "route": 0.75, "keep": 0.25}, "gate")
        self.directions = torch.nn.functional.normalize(torch.randn(1, len(LAYERS_READ), 128), dim=-1)
        self.routes = torch.full((ROLLOUTS,), int(Route.ABSORB))
        self.routes[: ROLLOUTS * 3 // 4] = int(Route.ROUTE)
        self.routes[ROLLOUTS * 3 // 4 :] = int(Route.KEEP)
        self.routes = self.routes[torch.randperm(ROLLOUTS)]
        self.step = 0

    def with_hooks(self, *hooks: dict[str, Any]) -> Bench:
        """The same batch on an engine of its own that has these hooks; the same initial weights."""
        other = copy.copy(self)
        other.engine = build_engine(self.folder, {**BLOCKS, "hooks": list(hooks)})
        return other

    def infer(self, rows: TensorDict, *, bare: bool = False, **extra: Any) -> dict[str, torch.Tensor]:
        """One forward pass, with the adapters off for ``bare``."""
        from contextlib import nullcontext

        from verl.utils import tensordict_utils as tu

        data = rows.copy()
        tu.assign_non_tensor(data, micro_batch_size_per_gpu=min(MICRO, len(data)), **COMMON, **extra)
        with self.engine.eval_mode(), self.engine.disable_adapter() if bare else nullcontext():
            return self.engine.infer_batch(data)["model_output"]

    def update(self, routed: bool) -> None:
        """One ``update_actor``."""
        routes = self.routes if routed else torch.full_like(self.routes, int(Route.ABSORB))
        update_actor(self.engine, self.batch, routes, DEFAULT, self.loss)

    def whole(self, routed: bool) -> None:
        """Everything of a step but generation and weight sync."""
        from verl_grad_routing.training.probe import Project

        self.infer(self.batch, calculate_entropy=True)
        probe = {"probe": Project(LAYERS_READ, self.directions)} if routed else {}
        output = self.infer(self.batch, bare=True, **probe) if self.kl or routed else {}
        if routed:
            self.step += 1
            scores = torch.cat(list(output["activation_scores"].unbind())).double()
            self.gate.decide(scores + torch.rand(ROLLOUTS, dtype=torch.float64) * 1e-6, self.step)
        self.update(routed)


BLOCKS = {"deployed_rank": 8, "quarantine_rank": 8}
COMMON = {"use_remove_padding": True, "use_dynamic_bsz": False, "use_fused_kernels": False, "temperature": 1.0}


def update_actor(engine: Any, batch: TensorDict, routes: torch.Tensor, table: RoutingTable, loss: Callable) -> None:
    """One ``update_actor`` of the whole batch."""
    from verl.utils import tensordict_utils as tu

    from verl_grad_routing.training.own_gate import CURRENT

    data = batch.copy()
    data["route"] = routes
    tu.assign_non_tensor(data, routing_table=table, micro_batch_size_per_gpu=MICRO, **COMMON)
    tu.assign_non_tensor(data, **{CURRENT: True})
    tu.assign_non_tensor(data, global_batch_size=ROLLOUTS, mini_batch_size=ROLLOUTS)
    with engine.train_mode():
        engine.train_batch(data, loss)


def prepare(folder: Path) -> None:
    """Write the model into ``folder`` and join a process group of one."""
    from transformers import LlamaForCausalLM
    from verl.utils.distributed import initialize_global_process_group_ray

    from verl_grad_routing.envs.chars.model import model_config
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    LlamaForCausalLM(model_config(ALPHABET)).save_pretrained(folder)
    rendezvous = {"RANK": "0", "WORLD_SIZE": "1", "DIST_INIT_METHOD": f"file://{folder / 'rendezvous'}"}
    os.environ.update(rendezvous)
    initialize_global_process_group_ray(backend=None if torch.cuda.is_available() else "cpu:gloo")


def build_engine(folder: Path, blocks: dict[str, Any] | None, lora_rank: int = 16) -> Any:
    """verl's engine with these blocks on the model in ``folder``; stock verl's, without any, for None."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    from verl_grad_routing.training.engine import STRATEGY
    from verl_grad_routing.training.engine_config import RoutedFSDPEngineConfig

    common: dict[str, Any] = {
        "strategy": "fsdp2",
        "use_torch_compile": False,
        "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    }
    if blocks is None:
        config = FSDPEngineConfig(**common)
    else:
        config = RoutedFSDPEngineConfig(blocks=blocks, **common)
        object.__setattr__(config, "strategy", STRATEGY)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=config.strategy,
        model_config=HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            lora_rank=lora_rank,
            lora_alpha=32,
            target_modules="all-linear",
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-5, total_training_steps=1000),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_loss(kl: bool) -> Callable:
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = ActorConfig(
        strategy="fsdp2",
        use_kl_loss=kl,
        kl_loss_coef=0.001,
        loss_agg_mode="seq-mean-token-sum-norm",
        loss_scale_factor=RESPONSE,
        ppo_micro_batch_size_per_gpu=MICRO,
        ppo_mini_batch_size=ROLLOUTS,
        rollout_n=1,
    )
    return partial(ppo_loss, config=config)


def make_batch(kl: bool) -> TensorDict:
    def jagged(width: int, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([draw(width) for _ in range(ROLLOUTS)], layout=torch.jagged)

    length = PROMPT + RESPONSE
    mask = jagged(RESPONSE, lambda n: torch.ones(n, dtype=torch.int64))
    fields = {
        "input_ids": jagged(length, lambda n: torch.randint(0, 40, (n,))),
        "position_ids": jagged(length, torch.arange),
        "prompts": jagged(PROMPT, lambda n: torch.randint(0, 40, (n,))),
        "responses": jagged(RESPONSE, lambda n: torch.randint(0, 40, (n,))),
        "response_mask": mask,
        "loss_mask": mask,
        "old_log_probs": jagged(RESPONSE, lambda n: torch.full((n,), -3.7)),
        "advantages": jagged(RESPONSE, lambda n: torch.randn(1).expand(n).clone()),
    }
    if kl:
        fields["ref_log_prob"] = jagged(RESPONSE, lambda n: torch.full((n,), -3.7))
    return TensorDict(fields, batch_size=[ROLLOUTS])


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_step_bench(json_path: Path | None = None, repeats: int = 30) -> dict[str, Any]:
    """Measure, print one line a ratio, and write all samples to ``json_path``.

    Returns:
        ``update``, ``step`` (KL reference on) and ``step_without_kl``: median ratio, interval, samples in seconds.
    """
    import verl  # noqa: F401  (loads the plugin: the CPU platform must exist before any engine module)

    torch.set_num_threads(CPU_THREADS)
    keeps = keep_freed_memory()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), kl=True)
        for name, kl, work in (
            ("update", True, bench.update),
            ("step", True, bench.whole),
            ("step_without_kl", False, bench.whole),
        ):
            bench.kl, bench.loss, bench.batch = kl, make_loss(kl), make_batch(kl)
            persona, vanilla = interleave(
                lambda work=work: timed(lambda: work(True)), lambda work=work: timed(lambda: work(False)), repeats
            )
            ratio = ratio_interval(persona, vanilla)
            results[name] = {**ratio.as_dict(), "persona_s": persona, "vanilla_2r_s": vanilla}
            print(f"{name:16} persona / vanilla_2r: {ratio}")
        torch.distributed.destroy_process_group()
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {CPU_THREADS} thread"
    results["keeps_freed_memory"] = keeps
    results["torch"] = torch.__version__
    if json_path is not None:
        Path(json_path).write_text(json.dumps(results, indent=2))
    return results
