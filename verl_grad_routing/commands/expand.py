"""``vgr expand``: the first step of Expand-Route-Ablate (Cloud et al., arXiv 2410.04332)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def expand(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face decoder of Llama's kind.")],
    to: Annotated[Path, typer.Option("--to", help="New folder for the expanded model.")],
    mlp_units: Annotated[int, typer.Option(help="New MLP units of every chosen layer.")] = 64,
    layers: Annotated[
        str | None, typer.Option(help='Layers that get them, from 0, as "0-4,7"; all by default.')
    ] = None,
    out_side: Annotated[
        str, typer.Option(help="What leads from new units: zero, the model computes what it did; or random.")
    ] = "zero",
    std: Annotated[
        float | None, typer.Option(help="Standard deviation of what is drawn; each matrix's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Give a model new MLP units for +grad_routing=era to route into; vgr export takes them away again."""
    from verl_grad_routing.deploy.expansion import Expand
    from verl_grad_routing.deploy.expansion import expand as run

    for line in run(Expand(model, mlp_units, layers, out_side, std, seed), to).lines():
        print(line)
