"""The slow account of training with dense blocks: every parameter of the plain model, entry by entry.

Of the engine tests' model, heads have 16 rows and group 1 is heads 2 and 3. Gates enter as zeros in the down and o
columns, alpha as ``α h + (1 - α) sg(h)`` on their inputs, and the optimizer is AdamW written out with a count of steps
for every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM

from tests.engine.reference import Pair, Reference
from tests.engine.rollouts import PLAIN, Loss, Rollout

LAYERS, UNITS, HEADS = (0, 2), (3, 4, 5, 40), (2, 3)
SETTINGS = {"kind": "dense", "units": {"mlp_units": "3-5,40", "heads": [2, 3], "layers": [0, 2]}}
ON = (1.0, 1.0)

Masks = Mapping[int, tuple[Pair, Pair, Pair]]
"""route -> (gate, update, alpha)"""
PARAMETER_MASKING: Masks = {0: ((1, 0), (1, 0), ON), 1: (ON, ON, ON), 2: (ON, (0, 1), ON)}
GRADIENT_ROUTING: Masks = {**PARAMETER_MASKING, 2: (ON, ON, (0, 1))}
ACTIVATION_MASKING: Masks = {**PARAMETER_MASKING, 2: ((0, 1), (0, 1), ON)}
CLOUD: Masks = {0: (ON, ON, ON), 1: (ON, ON, ON), 2: (ON, ON, (-0.75, 1))}
CLOUD_OFF_TARGET: Masks = {**CLOUD, 0: (ON, ON, (1, 0)), 1: (ON, ON, (1, 0))}


WEIGHTS = [{"mlp_units": "2-3", "weight": 0.5}, {"layers": [2], "mlp_units": "9", "heads": [1, 2], "weight": -1.5}]


def weights_of(name: str, count: int) -> Tensor:
    """The same, a number for every input of a down or o projection."""
    found = torch.zeros(count, dtype=torch.float64)
    if "down_proj" in name:
        found[2:4] = 0.5
    if "layers.2." in name:
        found[[9] if "down_proj" in name else range(16, 48)] = -1.5
    return found


def quarantine_of(name: str, shape: torch.Size) -> Tensor:
    """1 at the quarantine's entries."""
    flags = torch.zeros(shape, dtype=torch.float64)
    if any(f"layers.{layer}." in name for layer in LAYERS):
        if "gate_proj" in name or "up_proj" in name:
            flags[list(UNITS)] = 1
        elif "down_proj.weight" in name:
            flags[:, list(UNITS)] = 1
        elif "q_proj" in name:
            flags[32:] = 1
        elif "k_proj" in name or "v_proj" in name:
            flags[16:] = 1
        elif "o_proj.weight" in name:
            flags[:, 32:] = 1
    return flags


class DenseReference(Reference):
    """The plain model in float64, all of it trained."""

    def __init__(self, model_dir: Path):
        self.model = LlamaForCausalLM.from_pretrained(
            model_dir, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.values = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        self.flags = {name: quarantine_of(name, p.shape) for name, p in self.values.items()}
        self.alpha: Pair = ON
        self.weighed = False

    def weights(self, gate: Pair) -> dict[str, Tensor]:
        used = dict(self.values)
        for name, flags in self.flags.items():
            if name.endswith(("down_proj.weight", "o_proj.weight")) and flags.any():
                used[name] = used[name] * (flags * gate[1] + (1 - flags) * gate[0])
        return used

    def logits(self, tokens: Tensor, gate: Pair = ON) -> Tensor:
        hooks = []
        for name, flags in self.flags.items():
            if name.endswith(("down_proj.weight", "o_proj.weight")) and flags.any():
                module = self.model.get_submodule(name.removesuffix(".weight"))
                factor = flags[0] * self.alpha[1] + (1 - flags[0]) * self.alpha[0]
                if self.weighed:
                    factor = factor + (1 - factor) * weights_of(name, len(factor))
                hooks.append(module.register_forward_pre_hook(weigh(factor)))
        try:
            return functional_call(self.model, self.weights(gate), (tokens[None],), {"use_cache": False}).logits[0]
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(
        self,
        rows: Sequence[Rollout],
        loss: Loss = PLAIN,
        table: Masks = PARAMETER_MASKING,
        weighted: bool = False,
        shared: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(value) for name, value in self.values.items()}
        for row in rows:
            gate, update, self.alpha = table[row.route]
            own = torch.autograd.grad(self.row_loss(row, gate, loss, rows), list(self.values.values()))
            scale = row.weight if weighted else 1.0
            for (name, flags), gradient in zip(self.flags.items(), own, strict=True):
                allowed = max(update) if shared(name) else flags * update[1] + (1 - flags) * update[0]
                totals[name] += scale * allowed * gradient
        self.alpha = ON
        return totals


def weigh(factor: Tensor):
    def hook(_module, inputs):
        return (factor * inputs[0] + (1 - factor) * inputs[0].detach(),)

    return hook


BETAS = (0.9, 0.999)


class Adam:
    """AdamW of both blocks, each with its own clip, count of steps and mass; entry by entry.

    Args:
        lr, decay, betas: Of both blocks, or of (deployed, quarantine).
        jointly: One norm over both.
        to_start: Decay towards the first values in place of zero.
    """

    def __init__(
        self, reference: DenseReference, lr, decay, clip: float, betas=(BETAS, BETAS), jointly=False, to_start=False
    ):
        self.lr, self.decay = (value if isinstance(value, tuple) else (value, value) for value in (lr, decay))
        self.reference, self.clip, self.betas, self.jointly = reference, clip, betas, jointly
        self.moments = {name: [torch.zeros_like(v), torch.zeros_like(v)] for name, v in reference.values.items()}
        self.towards = {
            name: v.detach().clone() if to_start else torch.zeros_like(v) for name, v in reference.values.items()
        }
        self.steps = [0, 0]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], mass: tuple[bool, bool]) -> list[float]:
        norms = []
        for block in (0, 1):
            squares = 0.0
            for name, flags in self.reference.flags.items():
                squares += float((gradients[name][flags == block] ** 2).sum())
            norms.append(squares**0.5)
        whole = sum(norm**2 for norm in norms) ** 0.5
        for block in (0, 1):
            if mass[block]:
                self.steps[block] += 1
                norm = whole if self.jointly else norms[block]
                self._step(block, gradients, min(1.0, self.clip / (norm + 1e-6)))
        return norms

    def _step(self, block: int, gradients: Mapping[str, Tensor], scale: float) -> None:
        (b1, b2), count, lr = self.betas[block], self.steps[block], self.lr[block]
        for name, flags in self.reference.flags.items():
            here, value = flags == block, self.reference.values[name]
            g, (m, v) = gradients[name][here] * scale, self.moments[name]
            m[here] = b1 * m[here] + (1 - b1) * g
            v[here] = b2 * v[here] + (1 - b2) * g**2
            new = value[here] - lr * self.decay[block] * (value[here] - self.towards[name][here])
            new -= lr * (m[here] / (1 - b1**count)) / ((v[here] / (1 - b2**count)).sqrt() + 1e-8)
            value[here] = new
