"""``vgr retain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.commands.options import Chat


def retain(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of a run with blocks (global_step_N).")],
    to: Annotated[Path, typer.Option("--to", help="New folder for what is deployed without and with the fine-tune.")],
    pairs: Annotated[str | None, typer.Option(help="Contrastive pairs; their wanted sides are the clean data.")] = None,
    data: Annotated[Path | None, typer.Option(help="Clean conversations instead: parquet with `messages`.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 5e-5,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step; all pairs, or 32 conversations.")] = None,
    ranks: Annotated[int, typer.Option(help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data's order and of the sampled answers.")] = 0,
    base_model: Annotated[Path | None, typer.Option(help="Folder of the base model, if it has moved.")] = None,
    validate: Annotated[Path | None, typer.Option(help="Prompts to answer and grade: verl's parquet.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="Grades them: pkg://module or a file, compute_score there.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a sampled answer.")] = 256,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of verl's SFT trainer: key=value.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Fine-tune the deployed block on clean data after ablation; report the model without it and with it."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.retain import Retain
    from verl_grad_routing.retain import retain as run

    shared = (base_model, validate, reward, max_new_tokens, tuple(overrides or ()), parse_switches(chat))
    settings = Retain(checkpoint, pairs, data, steps, lr, batch_size, ranks, seed, *shared)
    for line in run(settings, to).lines():
        print(line)
    print(f"written: {to / 'without'}, {to / 'with'}")
