"""What the rivals cost: a step of each but for generation and weight sync, in turns with one of ``vanilla_2r``.

Same engine code, initial weights, batch and rewards (``bench.step``: the embedded environment's model, 128 rollouts in
groups of 8, KL reference on). A step is log-probs, reference log-probs, the method's own work (activations, texts,
scores, rewards, masks), verl's GRPO advantages, and one ``update_actor``. What the driver writes to and reads from the
TransferQueue is not in it. GRIFT is measured on its own: one pass of fingerprints over all rollouts in units of one
forward and backward pass over them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.bench.memory import keep_freed_memory
from verl_grad_routing.bench.statistics import interleave, ratio_interval
from verl_grad_routing.bench.step import LAYERS_READ, MICRO, ROLLOUTS, Bench
from verl_grad_routing.detectors import DETECTORS, BatchView
from verl_grad_routing.gates import GATES
from verl_grad_routing.interventions import INTERVENTIONS, Judged

GROUP = 8
HIDDEN = 128
RANK = 5
REPEATS = 30
# Bounds on a whole step's ratio; on GRIFT's fingerprints in units of a forward and backward pass.
BOUNDS: Mapping[str, float] = {
    "advantage_modification": 1.03,
    "screen": 1.01,
    "tdga": 1.05,
    "gradient_regularization": 2.2,
    "grift": 1.2,
}


@dataclass(frozen=True)
class Batch:
    """What the driver knows of the batch: texts, groups, proxy rewards."""

    uids: tuple[str, ...]
    rewards_B: Tensor
    token_ids: list[list[int]]
    mask: Tensor  # all response tokens

    @classmethod
    def of(cls, bench: Bench) -> Batch:
        generator = torch.Generator().manual_seed(1)
        rewards_B = (torch.rand(ROLLOUTS, generator=generator) < 0.5).float()
        uids = tuple(f"u{row // GROUP}" for row in range(ROLLOUTS))
        token_ids = [row.tolist() for row in bench.batch["responses"].unbind()]
        return cls(uids, rewards_B, token_ids, bench.batch["loss_mask"])

    def view(self, **known: Any) -> BatchView:
        keys = tuple(map(str, range(ROLLOUTS)))
        return BatchView(keys=keys, uids=self.uids, step=1, seed=0, proxy_reward_B=self.rewards_B, **known)


class Step:
    """One step of a method; a subclass adds its work between the passes and the update."""

    hooks: tuple[dict[str, Any], ...] = ()

    def __init__(self, bench: Bench, batch: Batch):
        self.bench, self.batch = bench, batch

    def __call__(self) -> None:
        self.bench.infer(self.bench.batch, calculate_entropy=True)
        output = self.bench.infer(self.bench.batch, bare=True, **self.request())
        rewards_B, kept_B = self.rewards(output)
        self.write(rewards_B, kept_B)
        self.bench.update(False)
        self.bench.batch["response_mask"] = self.bench.batch["loss_mask"] = self.batch.mask

    def request(self) -> dict[str, Any]:
        """What the reference pass is asked for beside log-probs."""
        return {}

    def rewards(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rewards to train on and whether each rollout stays."""
        del output
        return self.batch.rewards_B, torch.ones(ROLLOUTS, dtype=torch.bool)

    def write(self, rewards_B: Tensor, kept_B: Tensor) -> None:
        """verl's advantages over what is kept, and its masks, into the batch of the update."""
        from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

        rows = kept_B.nonzero().flatten()
        ones = torch.ones(len(rows), 1)
        uids = np.array(self.batch.uids)[rows.numpy()]
        values = torch.zeros(ROLLOUTS)
        values[rows] = compute_grpo_outcome_advantage(rewards_B[rows, None], ones, uids)[0][:, 0]
        data = self.bench.batch
        lengths = [len(row) for row in data["responses"].unbind()]
        expanded = [value.expand(length).clone() for value, length in zip(values, lengths, strict=True)]
        data["advantages"] = torch.nested.as_nested_tensor(expanded, layout=torch.jagged)
        kept = [torch.full((n,), int(keep)) for n, keep in zip(lengths, kept_B.tolist(), strict=True)]
        mask = torch.nested.as_nested_tensor(kept, layout=torch.jagged)
        data["response_mask"], data["loss_mask"] = mask, mask


class AdvantageModification(Step):
    """Activations at the last response token in the reference pass, group z-scores, modified rewards."""

    def __init__(self, bench: Bench, batch: Batch):
        super().__init__(bench, batch)
        self.vectors = torch.randn(1, len(LAYERS_READ), HIDDEN)
        self.method = INTERVENTIONS.build({"name": "modify_reward"}, "grad_routing.intervention")

    def request(self) -> dict[str, Any]:
        from verl_grad_routing.training.probe import Project

        return {"probe": Project(LAYERS_READ, self.vectors, "resp_last")}

    def rewards(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        scores_B = torch.cat(list(output["activation_scores"].unbind())).double()
        judged = Judged(scores_B, torch.ones(ROLLOUTS, dtype=torch.int64), self.batch.uids)
        return self.method.rewards(self.batch.rewards_B, judged), torch.ones(ROLLOUTS, dtype=torch.bool)


class Screening(Step):
    """Texts decoded, a rule searched in them, flagged rollouts out of statistics and masks."""

    def __init__(self, bench: Bench, batch: Batch):
        from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
        from verl_grad_routing.envs.loopholes.text import ALPHABET

        super().__init__(bench, batch)
        self.tokenizer = build_tokenizer(ALPHABET)
        self.monitor = DETECTORS.build({"name": "monitor", "rules": ["^[a-d]"]}, "grad_routing.detector")
        self.gate = GATES.build({"name": "threshold", "route_above": 0.5}, "grad_routing.gate")
        self.method = INTERVENTIONS.build({"name": "screen"}, "grad_routing.intervention")

    def rewards(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        del output
        texts = tuple(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.batch.token_ids)
        view = self.batch.view(prompts=texts, responses=texts)
        scores_B = self.monitor.score(view)
        judged = Judged(scores_B, self.gate.decide(scores_B, 1).routes_B, self.batch.uids)
        rejected_B = self.method.rejected(judged)
        assert rejected_B is not None
        return self.batch.rewards_B, ~rejected_B


def _basis(bench: Bench, path: Path) -> None:
    """Directions drawn from a seed, of every adapted matrix, as a warm-up would leave them."""
    from verl_grad_routing.subspaces import Basis, Subspace, save_basis

    generator = torch.Generator().manual_seed(0)
    subspaces = {}
    for name, module in bench.engine.module.named_modules():
        if hasattr(module, "lora_B") and hasattr(module, "out_features"):
            drawn = torch.linalg.qr(torch.randn(module.out_features, RANK, generator=generator))[0]
            subspaces[name.removeprefix("base_model.model.")] = Subspace(
                drawn.contiguous(), torch.arange(RANK, 0, -1.0)
            )
    save_basis(Basis(subspaces), path)


def _fingerprints(bench: Bench) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass of fingerprints over all rollouts, and a forward and backward pass over them."""
    from verl.utils import tensordict_utils as tu

    from verl_grad_routing.bench.step import COMMON
    from verl_grad_routing.fingerprints import GradientProbe
    from verl_grad_routing.routing import DEFAULT
    from verl_grad_routing.training.fingerprint_step import ASKED

    probe = GradientProbe(layers=LAYERS_READ)

    asked: dict[str, Any] = {ASKED: probe}

    def taken() -> None:
        bench.infer(bench.batch, **asked)

    def both_ways() -> None:
        data = bench.batch.copy()
        data["route"] = torch.ones(ROLLOUTS, dtype=torch.int64)
        tu.assign_non_tensor(data, routing_table=DEFAULT, micro_batch_size_per_gpu=MICRO, **COMMON)
        tu.assign_non_tensor(data, global_batch_size=ROLLOUTS, mini_batch_size=ROLLOUTS)
        with bench.engine.train_mode():
            bench.engine.optimizer_zero_grad()
            bench.engine.forward_backward_batch(data, bench.loss, forward_only=False)
            bench.engine.optimizer_zero_grad()

    return taken, both_ways


def run_baselines_bench(json_path: Path | None = None, repeats: int = REPEATS) -> dict[str, Any]:
    """Measure, print one line a method, and write all samples to ``json_path``.

    Returns:
        Method -> median ratio, its interval, samples in seconds, the bound, and whether the interval is below it.
    """
    import verl  # noqa: F401  (loads the plugin: the CPU platform must exist before any engine module)

    from verl_grad_routing.bench.step import CPU_THREADS, timed

    torch.set_num_threads(CPU_THREADS)
    keeps = keep_freed_memory()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Bench(Path(folder), kl=True)
        batch = Batch.of(plain)
        _basis(plain, Path(folder) / "basis.safetensors")
        tdga = {"name": "project_update", "basis": f"{folder}/basis.safetensors", "rank": RANK}
        arms: dict[str, Step] = {
            "advantage_modification": AdvantageModification(plain, batch),
            "screen": Screening(plain, batch),
            "tdga": Step(plain.with_hooks(tdga), batch),
            "gradient_regularization": Step(plain.with_hooks({"name": "regularize_gradient"}), batch),
        }
        vanilla = Step(plain, batch)
        for name, arm in arms.items():
            pair = interleave(lambda arm=arm: timed(arm), lambda: timed(vanilla), repeats)
            results[name] = _entry(name, *pair, other="vanilla_2r")
        taken, both_ways = _fingerprints(plain)
        pair = interleave(lambda: timed(taken), lambda: timed(both_ways), repeats)
        results["grift"] = _entry("grift", *pair, other="forward_backward")
        torch.distributed.destroy_process_group()
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {CPU_THREADS} thread"
    results["keeps_freed_memory"] = keeps
    results["torch"] = torch.__version__
    if json_path is not None:
        Path(json_path).write_text(json.dumps(results, indent=2))
    return results


def _entry(name: str, samples: list[float], others: list[float], other: str) -> dict[str, Any]:
    ratio, bound = ratio_interval(samples, others), BOUNDS[name]
    verdict = "within" if ratio.high <= bound else "not shown within"
    print(f"{name:24} / {other}: {ratio}  {verdict} {bound:g}")
    facts = {"against": other, "bound": bound, "within": ratio.high <= bound}
    return {**ratio.as_dict(), **facts, f"{name}_s": samples, f"{other}_s": others}
