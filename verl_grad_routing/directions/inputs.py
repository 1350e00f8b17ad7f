"""What contrastive texts change in the inputs of a model's linear layers.

Legend: ``P`` pairs, ``T`` tokens of a text, ``I`` input size of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError

Tokens = Sequence[int]


@torch.no_grad()
def input_differences(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    texts: Iterable[tuple[Tokens, Tokens, Tokens]],
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Mean input over the completion's tokens, unwanted side minus wanted side, of every layer: name -> ``[P, I]``.

    Layers that some text does not reach (experts, towers of other modalities) are left out. Every side is a pass of its
    own without padding, and means are float64, so that a pair's row does not depend on the other pairs.

    Args:
        model: Takes ``input_ids [1, T]``; its mode is set to evaluation.
        layers: Modules whose first argument is read, ``[1, T, I]``.
        texts: (prompt, unwanted, wanted) token ids of each pair.
        advance: Called after every pair.

    Raises:
        UserError: A difference is not finite (names pair number and layer).
    """
    model.eval()
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for number, (prompt, *sides) in enumerate(texts, start=1):
        means = []
        for side in sides:
            with _inputs(layers, len(prompt)) as heard:
                model(input_ids=torch.tensor([[*prompt, *side]], device=device), use_cache=False)
            means.append(heard)
        rows = {name: row for name, row in rows.items() if all(name in heard for heard in means)}
        for name, row in rows.items():
            difference_I = means[0][name] - means[1][name]
            if not torch.isfinite(difference_I).all():
                raise UserError(f"pair number {number}", f"layer {name}", "its inputs are not finite; repair the model")
            row.append(difference_I.float().cpu())
        advance("")
    return {name: torch.stack(row) for name, row in rows.items()}


@contextmanager
def _inputs(layers: Mapping[str, nn.Module], skip: int) -> Iterator[dict[str, Tensor]]:
    """Mean over the tokens after the first ``skip`` of what each layer is given while this lasts, float64 ``[I]``."""
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
            heard[name] = given[0].detach()[0, skip:].double().mean(0)

        return keep

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
