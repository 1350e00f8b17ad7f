"""``vgr relearn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.commands.options import Chat


def relearn(
    model: Annotated[
        Path, typer.Argument(help="What is attacked: a run's checkpoint (global_step_N), a model or an adapter folder.")
    ],
    to: Annotated[Path, typer.Option("--to", help="New folder for the report and the rows learned.")],
    validate: Annotated[Path, typer.Option(help="Prompts to answer and grade: verl's parquet.")],
    reward: Annotated[str, typer.Option(help="Grades them: pkg://module or a file, compute_score there.")],
    hacks: Annotated[
        Path | None, typer.Option(help="Recorded batches of a run, or parquet with prompt, response, hack, solve.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to sample hacks with instead, from the model as trained.")
    ] = None,
    trained: Annotated[
        Path | None, typer.Option(help="The model as trained, whose rate is the goal; a checkpoint's own if not given.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="A hack rate as the goal instead.")] = None,
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Model attacked beside it; a checkpoint's base model if not given.")
    ] = None,
    clean_share: Annotated[float, typer.Option(help="Share of true solutions among the rows; 0: hacks alone.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each attack.")] = 200,
    every: Annotated[int, typer.Option(help="Steps between measurements.")] = 25,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, constant.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 32,
    ranks: Annotated[int, typer.Option(help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data's order and of sampled answers.")] = 0,
    base_model: Annotated[Path | None, typer.Option(help="Folder of the base model, if it has moved.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a sampled answer.")] = 256,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of verl's SFT trainer: key=value.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Fine-tune what is deployed on hacks; say how many steps bring hacking back, beside the model before RL."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.relearn import Relearn
    from verl_grad_routing.relearn import relearn as run

    settings = Relearn(
        model=model,
        validate=validate,
        reward=reward,
        hacks=hacks,
        prompts=prompts,
        trained=trained,
        target=target,
        baselines=tuple(baseline) if baseline else None,
        clean_share=clean_share,
        steps=steps,
        every=every,
        lr=lr,
        batch_size=batch_size,
        ranks=ranks,
        seed=seed,
        base_model=base_model,
        max_new_tokens=max_new_tokens,
        overrides=tuple(overrides or ()),
        chat=parse_switches(chat),
    )
    for line in run(settings, to).lines():
        print(line)
    print(f"report: {to / 'relearn.json'}")
