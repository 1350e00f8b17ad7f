"""``vgr pairs``: the model writes its own contrastive pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.commands.options import Chat


def pairs(
    model: Annotated[Path, typer.Argument(help="Folder of the model (or exported adapter) that writes both sides.")],
    framings: Annotated[Path, typer.Option(help="YAML: how each side's prompt is framed (unwanted:, wanted:).")],
    prompts: Annotated[Path, typer.Option(help="The run's data (.parquet), or .jsonl with a field `prompt`.")],
    to: Annotated[Path, typer.Option("--to", help="File for the pairs: name.jsonl; name.report.json goes beside it.")],
    count: Annotated[int, typer.Option(help="Pairs to keep.")] = 24,
    candidates: Annotated[int, typer.Option(help="Prompts to try at most.")] = 240,
    min_share: Annotated[float, typer.Option(help="Least share of valid candidates.")] = 0.1,
    min_tokens: Annotated[int, typer.Option(help="Least tokens of a side, its end included.")] = 2,
    max_ratio: Annotated[float, typer.Option(help="Largest ratio of the two sides' lengths.")] = 4.0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a side.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the sampling and of the prompts' order.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    chat: Chat = None,
) -> None:
    """Let a model write contrastive pairs: the same prompts, answered under two framings."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.self_pairs import Limits, SelfPairs, write_pairs

    settings = SelfPairs(
        model,
        framings,
        prompts,
        count,
        candidates,
        min_share,
        batch_size,
        max_new_tokens,
        temperature,
        seed,
        Limits(min_tokens, max_ratio),
        parse_switches(chat),
    )
    write_pairs(settings, to, force)
