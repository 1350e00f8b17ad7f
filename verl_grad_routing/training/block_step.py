"""One optimizer step over two blocks: clipped each by its own norm, and a block without mass not stepped at all.

Adam's momentum and decoupled weight decay move a parameter whose gradient is zero; only ``grad = None`` leaves it and
its optimizer state alone. A block's mass is the number of tokens that train it in the mini-batch, so the decision never
depends on the size of a gradient or an advantage. ``freeze_inactive=False`` steps it all the same, with a gradient of
zero, as the literature's optimizers do.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_

from verl_grad_routing.training.block_optim import DecayToStart
from verl_grad_routing.training.block_shares import quarantine_share
from verl_grad_routing.training.hooks import Blocks, EngineHook, local

NAMES = ("deployed", "quarantine")


def _norm(shards: Sequence[torch.Tensor]) -> float:
    """Euclidean norm of DTensors over all ranks (or of plain tensors)."""
    norms = torch.nn.utils.get_total_norm(list(shards))
    return float(norms.full_tensor() if isinstance(norms, DTensor) else norms)


class BlockStep:
    """Callable in place of verl's clip-and-step.

    Args:
        optimizer: One parameter group a block.
        blocks: Parameters of each block.
        clip_norms: Gradient norm limit of each block.
        hooks: Engine hooks, in order.
        jointly: Clip by one norm over both blocks, under the larger of the two limits.
        decay: Decay towards the start.
        freeze_inactive: Do not step a block that no token trains; otherwise its gradient is zero.

    Attributes:
        metrics: Of the last step: ``routing/mass_*``, ``routing/grad_norm/*`` (before clipping) and
            ``routing/update_norm/*``, the quarantine's share of both, and what hooks report; ``routing/lr/*`` where the
            blocks' learning rates differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        blocks: Blocks,
        clip_norms: Mapping[str, float],
        hooks: Sequence[EngineHook],
        *,
        jointly: bool = False,
        decay: DecayToStart | None = None,
        freeze_inactive: bool = True,
    ):
        self.optimizer, self.blocks, self.clip_norms, self.hooks = optimizer, blocks, clip_norms, hooks
        self.jointly, self.decay, self.freeze_inactive = jointly, decay, freeze_inactive
        self.metrics: dict[str, float] = {}

    @torch.no_grad()  # hooks change parameters and gradients in place
    def __call__(
        self,
        mass_2: Sequence[float],
        gradients_anew: Callable[[], None],
        factors_2: Sequence[float] = (1.0, 1.0),
    ) -> float:
        """Clip and step. Returns the norm over both blocks.

        Args:
            mass_2: Tokens that train each block.
            gradients_anew: Computes the mini-batch's gradients once more, for the hooks that ask.
            factors_2: What each block's gradient is multiplied by, before hooks and clipping.
        """
        masses = self._masses(mass_2)
        self._settle(masses, factors_2)

        def recompute() -> None:
            gradients_anew()
            self._settle(masses, factors_2)

        for hook in self.hooks:
            hook.transform_gradients(self.blocks, recompute)
        norms = self._clip_jointly() if self.jointly else {name: self._clip(name) for name in self.blocks}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        updates: dict[str, float] = dict.fromkeys(self.blocks, 0.0)
        if torch.isfinite(torch.tensor(total)):
            updates = self._step()
        else:
            print(f"WARN: grad_norm is not finite: {norms}; this update is skipped")
            self.optimizer.zero_grad()
        self.metrics = {f"routing/mass_{name}": masses[name] for name in NAMES}
        self.metrics |= {f"routing/grad_norm/{name}": norm for name, norm in norms.items()}
        self.metrics |= {f"routing/update_norm/{name}": norm for name, norm in updates.items()}
        self.metrics |= quarantine_share("grad", norms) | quarantine_share("update", updates)
        rates = {name: group["lr"] for name, group in zip(self.blocks, self.optimizer.param_groups, strict=True)}
        if len(set(rates.values())) > 1:
            self.metrics |= {f"routing/lr/{name}": rate for name, rate in rates.items()}
        for hook in self.hooks:
            self.metrics |= {f"routing/{hook.name}/{key}": value for key, value in hook.metrics.items()}
        return total

    def _masses(self, mass_2: Sequence[float]) -> dict[str, float]:
        return dict(zip(NAMES, mass_2, strict=True))

    def _settle(self, masses: Mapping[str, float], factors_2: Sequence[float]) -> None:
        """No gradient at all for a block without mass (or zero), the factor for the others."""
        factors: dict[str, float] = dict(zip(NAMES, factors_2, strict=True))
        for name, parameters in self.blocks.items():
            factor = factors.get(name, 1.0)
            for parameter in parameters:
                if masses[name] == 0 and self.freeze_inactive:
                    parameter.grad = None
                elif masses[name] == 0 and parameter.grad is not None:
                    parameter.grad.zero_()
                elif factor != 1.0 and parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _clip_jointly(self) -> dict[str, float]:
        """One factor for both blocks; the norms are each block's own, before it."""
        with_gradient = {n: [p for p in block if p.grad is not None] for n, block in self.blocks.items()}
        norms = {n: _norm([p.grad for p in block]) if block else 0.0 for n, block in with_gradient.items()}
        everything = [p for block in with_gradient.values() for p in block]
        if everything:
            fsdp2_clip_grad_norm_(everything, max_norm=max(self.clip_norms.values()))
        return norms

    def _clip(self, name: str) -> float:
        parameters = [parameter for parameter in self.blocks[name] if parameter.grad is not None]
        if not parameters:
            return 0.0
        norm = fsdp2_clip_grad_norm_(parameters, max_norm=self.clip_norms[name])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _step(self) -> dict[str, float]:
        before = {name: [p.detach().clone() for p in parameters] for name, parameters in self.blocks.items()}
        self._decay()
        self.optimizer.step()
        for hook in self.hooks:
            hook.transform_update(self.blocks, {name: [local(t) for t in shards] for name, shards in before.items()})
        return {
            name: _norm([p.detach() - old for p, old in zip(parameters, before[name], strict=True)])
            for name, parameters in self.blocks.items()
        }

    def _decay(self) -> None:
        if self.decay is not None:
            for (name, parameters), group in zip(self.blocks.items(), self.optimizer.param_groups, strict=True):
                self.decay(name, parameters, group["lr"])
