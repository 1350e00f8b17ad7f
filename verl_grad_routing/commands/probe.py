"""``vgr probe``: fit a linear probe on labelled rollouts, and look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.commands.options import Chat
from verl_grad_routing.errors import UserError

app = typer.Typer(help="Linear probes on activations, for detector linear_probe.", no_args_is_help=True)


@app.command()
def fit(
    model: Annotated[Path, typer.Argument(help="Folder of the model whose activations are read.")],
    rollouts: Annotated[Path, typer.Argument(help="Batches that a run recorded (a folder), or parquet.")],
    to: Annotated[Path, typer.Option("--to", help="File for the probe: name.safetensors.")],
    label: Annotated[str, typer.Option(help="Fact of recorded batches, or column; non-zero is unwanted.")] = "hack",
    origin: Annotated[str, typer.Option(help="Who labelled: labels (the grader), monitor or pairs.")] = "labels",
    layer: Annotated[
        list[int] | None, typer.Option(help="Layers to read, from 1; 60-75% of the depth if none.")
    ] = None,
    position: Annotated[str, typer.Option(help="resp_mean, resp_last or prompt_last.")] = "resp_mean",
    fpr: Annotated[float, typer.Option(help="Share of held-out clean rollouts that may be flagged.")] = 0.05,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that judge and do not train.")] = 0.3,
    c: Annotated[float, typer.Option(help="Inverse strength of the L2 penalty.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    chat: Chat = None,
) -> None:
    """Fit a logistic regression on pooled activations; its threshold is chosen on prompts it has not seen."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.detectors.probe_file import save_probe
    from verl_grad_routing.directions.checks import require_choice
    from verl_grad_routing.directions.pooling import POSITIONS
    from verl_grad_routing.probes.command import fit_on_rollouts
    from verl_grad_routing.probes.fit import FitSettings

    if to.suffix != ".safetensors":
        raise UserError("--to", str(to), "give a file name.safetensors")
    require_choice("--position", position, POSITIONS)
    settings = FitSettings(fpr, held_out, c, seed)
    given = (tuple(layer or ()), position, settings, parse_switches(chat))
    probe = fit_on_rollouts(model, rollouts, label, origin, *given)
    save_probe(probe, to)
    show(to)


@app.command()
def show(probe: Annotated[Path, typer.Argument(help="A file that `vgr probe fit` wrote.")]) -> None:
    """What a probe reads, where it comes from, and how it did on the prompts that were held out."""
    from verl_grad_routing.detectors.probe_file import load_probe

    found = load_probe(probe, "PROBE")
    report = found.report
    print(f"{probe}: {found.position} after layers {list(found.layers)}, labelled by {found.origin}")
    print(f"data {found.data_hash[:12]}, {report['rollouts']} rollouts of {report['prompts']} prompts, ", end="")
    print(f"{report['unwanted']} unwanted, {report['held_out']} held out")
    print(
        f"held out: AUROC {report['held_out_auroc']:.3f}, recall {report['held_out_recall']:.3f} at "
        f"{report['held_out_false_positive_rate']:.3f} false positives"
    )
