"""What contrastive pairs change in the inputs of every linear layer, as one safetensors file.

Shapes: P pairs, I input size of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl_grad_routing.errors import UserError

FORMAT = "verl-grad-routing-contrast-1"
KEY = "grad_routing.blocks.contrast"
COMMAND = "vgr contrast MODEL --pairs FILE --to FILE"


@dataclass(frozen=True, eq=False)
class Contrast:
    """Pooled inputs of every linear layer, unwanted side minus wanted side, pair by pair.

    Attributes:
        differences: Module name in the base model, e.g. ``model.layers.0.self_attn.q_proj`` -> ``[P, I]``, float32.
        origin: Where it comes from, plain strings: the model, its hash, the pairs, their hash.
    """

    differences: Mapping[str, Tensor]
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.differences:
            raise UserError(KEY, "no layers", f"make it anew: {COMMAND}")
        for name, difference_PI in self.differences.items():
            if difference_PI.ndim != 2 or not len(difference_PI) or not bool(torch.isfinite(difference_PI).all()):
                fix = f"the differences of {name} must be finite numbers [P, I]; make it anew: {COMMAND}"
                raise UserError(KEY, tuple(difference_PI.shape), fix)

    def of(self, module: str, d_in: int) -> Tensor:
        """``[P, d_in]`` of one layer. Raises ``UserError`` for a layer that it has not, or another input size."""
        if module not in self.differences:
            fix = f"it has no layer {module}: made on another model, or exclude the layer from target_modules"
            raise UserError(KEY, self.origin.get("model"), fix)
        difference_PI = self.differences[module]
        if difference_PI.shape[1] != d_in:
            fix = f"{module} has {d_in} inputs and its differences {difference_PI.shape[1]}: made on another model"
            raise UserError(KEY, self.origin.get("model"), fix)
        return difference_PI


def save_contrast(contrast: Contrast, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    tensors = {name: difference.float().contiguous() for name, difference in contrast.differences.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": FORMAT, **contrast.origin})
    partial.replace(path)


def load_contrast(path: str | Path) -> Contrast:
    """Read ``save_contrast``. Raises ``UserError``: no such file, or another kind of file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(KEY, str(path), f"no such file; make one: {COMMAND}")
    try:
        with safe_open(path, framework="pt") as file:
            origin = dict(file.metadata() or {})
            if origin.pop("format", None) != FORMAT:
                raise UserError(KEY, str(path), f"not a contrast; make one: {COMMAND}")
            differences = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise UserError(KEY, str(path), f"not a safetensors file ({error})") from None
    return Contrast(differences, origin)
