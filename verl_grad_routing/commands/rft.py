"""``vgr rft``: rejection fine-tuning with GRIFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from verl_grad_routing.commands.options import Chat
from verl_grad_routing.errors import UserError


def rft_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder to sample from and to fine-tune; it stays.")],
    data: Annotated[Path, typer.Option("--data", help="Prompts: parquet in verl's format.")],
    to: Annotated[Path, typer.Option("--to", help="New folder for the model and the report.")],
    rules: Annotated[
        list[str] | None, typer.Option("--rule", help="Regular expression; found in a response it is hacking.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="module:function of (prompt, response), 1 is hacking.")] = None,
    truth: Annotated[bool, typer.Option("--truth", help="Control: clusters labelled by the grader's facts.")] = False,
    detector: Annotated[
        list[str] | None, typer.Option("--detector", help="Further setting of detector grift: key=value.")
    ] = None,
    filter: Annotated[str, typer.Option(help="grift; permuted (control); none (plain rejection).")] = "grift",
    reward: Annotated[str | None, typer.Option(help="module:function; the environment's if not given.")] = None,
    positive_reward: Annotated[float, typer.Option(help="Least reward of a correct response.")] = 1.0,
    prompts: Annotated[int, typer.Option(help="Prompts, from the data's first.")] = 2048,
    samples: Annotated[int, typer.Option(help="Responses to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Length limit of a response.")] = 1024,
    keep: Annotated[int, typer.Option(help="Responses to learn from at most, lowest score first.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate, cosine.")] = 1e-5,
    epochs: Annotated[int, typer.Option(help="Passes over what is kept.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows of an optimizer step.")] = 16,
    response_only: Annotated[bool, typer.Option("--response-only", help="Do not learn the prompts.")] = False,
    engine: Annotated[str, typer.Option(help="What samples: transformers or vllm.")] = "transformers",
    ranks: Annotated[int, typer.Option(help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling, permutation and order.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Further setting of verl's SFT trainer: key=value.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Rejection fine-tuning (GRIFT): sample, keep what is rewarded, drop what looks like hacking, fine-tune."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.rejection import Rft, rft

    settings = Rft(
        model=model,
        data=data,
        detector=detector_settings(rules, judge, truth, detector or []),
        filter=filter,
        reward=reward,
        positive_reward=positive_reward,
        prompts=prompts,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        keep=keep,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        full_text=not response_only,
        engine=engine,
        ranks=ranks,
        seed=seed,
        overrides=tuple(overrides or ()),
        chat=parse_switches(chat),
    )
    for key, value in rft(settings, to).items():
        print(f"{key:<16}  {value}")


def detector_settings(rules: list[str] | None, judge: str | None, truth: bool, further: list[str]) -> dict[str, Any]:
    """Settings of detector ``grift`` from the command line; values of ``further`` are YAML. Raises ``UserError``."""
    import yaml

    settings: dict[str, Any] = {"rules": rules} if rules else {}
    settings |= {"judge": judge} if judge else {}
    settings |= {"label_by": "gt_anchor"} if truth else {}
    for one in further:
        key, found, value = one.partition("=")
        if not found:
            raise UserError("--detector", one, "write it as key=value")
        settings[key] = yaml.safe_load(value)
    return settings
