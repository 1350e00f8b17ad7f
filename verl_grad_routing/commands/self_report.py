"""``vgr self-report`` and ``vgr interrogate``: teach a model to admit known errors, and ask it about its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.commands.options import Chat
from verl_grad_routing.errors import UserError

app = typer.Typer(help="Teach a model to admit known errors, before RL (arXiv 2511.06626).", no_args_is_help=True)


@app.command()
def lessons(
    environment: Annotated[Path, typer.Argument(help="Folder that `vgr prepare loopholes` wrote.")],
    to: Annotated[Path, typer.Option("--to", help="File for the lessons: name.jsonl.")],
    count: Annotated[int, typer.Option(help="Lessons, half admissions and half denials.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
) -> None:
    """Write lessons for the embedded environment, about its known loophole type alone, as contrastive pairs."""
    from verl_grad_routing.self_report.data import loopholes_lessons, write_lessons

    write_lessons(loopholes_lessons(environment, count, seed), to)
    print(f"{to}: {count} lessons")


@app.command()
def train(
    model: Annotated[Path, typer.Argument(help="Folder of the model to start from; it stays as it is.")],
    to: Annotated[Path, typer.Option("--to", help="New folder for the model that admits.")],
    pairs: Annotated[str, typer.Option(help="Lessons; their wanted sides are what is learned.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Lessons of a step.")] = 64,
    ranks: Annotated[int, typer.Option(help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data's order.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of verl's SFT trainer: key=value.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Fine-tune a model on lessons with verl's SFT trainer; RL then starts from the folder written."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.self_report.train import self_report_model
    from verl_grad_routing.warm_up import WarmUp

    given = (tuple(overrides or ()), parse_switches(chat))
    settings = WarmUp(model, pairs, None, 1, steps, lr, batch_size, ranks, seed, *given)
    print(f"{self_report_model(settings, to)}: after {steps} steps on {pairs}")


def interrogate(
    model: Annotated[Path, typer.Argument(help="A model's folder, or a checkpoint of a run (global_step_N).")],
    environment: Annotated[Path, typer.Argument(help="Folder that `vgr prepare` wrote.")],
    split: Annotated[str, typer.Option(help="Data file whose prompts are answered.")] = "test",
    question: Annotated[str | None, typer.Option(help="loopholes or chat; by the environment if not given.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts; 0 takes all.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; by the question if not given.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the answers.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file; null is a share of none.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Let a model answer, ask it about each answer, and compare what it admits with the grader."""
    from json import dumps

    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.self_report.command import interrogate_model

    if not model.is_dir():
        raise UserError("MODEL", str(model), "no such folder; give a model's, or a global_step_N of a run")
    found = interrogate_model(
        model,
        environment,
        split=split,
        question=question,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=parse_switches(chat),
    )
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    if json is not None:
        written = {name: None if value != value else value for name, value in found.items()}  # shares of none
        json.write_text(dumps(written, indent=2, allow_nan=False) + "\n")
