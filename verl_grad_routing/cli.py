"""The command ``vgr``. Each command imports what it needs when it runs, so that ``vgr --help`` stays quick."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_grad_routing.commands import probe as probe_command
from verl_grad_routing.commands import retain, tables
from verl_grad_routing.commands import self_report as self_report_commands
from verl_grad_routing.commands.bench_routing import routing
from verl_grad_routing.commands.contrast import contrast
from verl_grad_routing.commands.expand import expand
from verl_grad_routing.commands.leakage import leakage
from verl_grad_routing.commands.options import Chat
from verl_grad_routing.commands.pairs import pairs
from verl_grad_routing.commands.relearn import relearn
from verl_grad_routing.commands.rft import rft_command
from verl_grad_routing.commands.token_weights import token_weights
from verl_grad_routing.errors import UserError

app = typer.Typer(
    name="vgr",
    help="Gradient routing for verl. Training itself is `python -m verl.trainer.main_ppo ... +grad_routing=<preset>`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure what routing costs.", no_args_is_help=True)
app.add_typer(bench, name="bench")

# Optional packages and the extra that brings them.
EXTRAS = {"matplotlib": "report", "vllm": "gpu"}

To = Annotated[Path, typer.Option("--to", help="Folder to write into; created when missing.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


class Kind(str, Enum):
    """What ``vgr list`` can list."""

    presets = "presets"
    detectors = "detectors"
    gates = "gates"
    interventions = "interventions"
    environments = "environments"
    hooks = "hooks"
    bases = "bases"
    forms = "forms"


class Format(str, Enum):
    """What ``vgr export`` writes: a PEFT adapter folder, or a whole Hugging Face model."""

    peft = "peft"
    hf = "hf"


class Blocks(str, Enum):
    """Which adapter blocks ``vgr export`` keeps."""

    deployed = "deployed"
    both = "both"
    quarantine = "quarantine"


@app.command()
def doctor() -> None:
    """Check versions, machine, verl's seams and registrations; exit status 1 if anything fails."""
    from rich.console import Console
    from rich.text import Text

    from verl_grad_routing.doctor import Status, run_checks

    console = Console(highlight=False, soft_wrap=True)
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    failed = 0
    for check in run_checks():
        line = Text(str(check))
        line.stylize(colours[check.status], 0, len(check.status.value))
        console.print(line)
        failed += check.status is Status.FAIL
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_names(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what can be named in a configuration, one per line."""
    rows = {
        Kind.presets: _presets,
        Kind.detectors: _detectors,
        Kind.gates: _gates,
        Kind.interventions: _interventions,
        Kind.environments: _environments,
        Kind.hooks: _hooks,
        Kind.bases: _bases,
        Kind.forms: _forms,
    }[kind]()
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="An environment; see `vgr list environments`.")],
    to: To,
    seed: Annotated[int | None, typer.Option(help="Seed of data and model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there already.")] = False,
    problems: Annotated[Path | None, typer.Option(help="Your own programming problems (code_loopholes).")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run programs without a sandbox (code_loopholes).")] = False,
    settings: Annotated[Path | None, typer.Option(help="YAML file with the environment's settings.")] = None,
    given: Annotated[list[str] | None, typer.Option("--set", help="One setting: key=value; may be repeated.")] = None,
) -> None:
    """Build an environment: data, a model to start from, contrastive pairs and a grader."""
    from verl_grad_routing.commands.prepare import read_settings
    from verl_grad_routing.envs import prepare_environment

    options: dict[str, Any] = read_settings(settings, given or ())
    options |= {} if seed is None else {"seed": seed}
    options |= {} if problems is None else {"problems": str(problems)}
    options |= {"unsafe": True} if unsafe else {}
    prepare_environment(name, to, force=force, **options)
    print(f"{name}: ready in {to}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of a run: .../global_step_N.")],
    to: To,
    format: Annotated[Format, typer.Option(help="peft: an adapter folder; hf: a whole model.")] = Format.peft,
    blocks: Annotated[
        Blocks | None,
        typer.Option(
            help="deployed: no quarantine; both: as trained; quarantine: alone, a control; the preset's if not given."
        ),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Folder of the base model, if it has moved.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder, for the rates on the model card.")] = None,
    max_difference: Annotated[float | None, typer.Option(help="Largest logit difference accepted.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write what is deployed, as files that transformers, PEFT and vLLM load, and check their logits."""
    if not checkpoint.is_dir():
        raise UserError("CHECKPOINT", str(checkpoint), "no such folder; give a global_step_N folder of a run")
    from verl_grad_routing.deploy import export as export_checkpoint

    export_checkpoint(
        checkpoint,
        to,
        format.value,
        blocks.value if blocks else None,
        base_model=base_model,
        max_difference=max_difference,
        run=run,
        force=force,
    )


@bench.command()
def kernel(
    json: JsonFile = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the best one there by default.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Interleaved repetitions per variant.")] = 30,
) -> None:
    """Forward and backward of adapted linears: ours against PEFT's LoRA of the same total rank."""
    from verl_grad_routing.bench.kernel import run_kernel_bench

    run_kernel_bench(json_path=json, device=device, repeats=repeats)


@bench.command()
def step(json: JsonFile = None) -> None:
    """One update of the actor and one whole step: routed against unrouted."""
    from verl_grad_routing.bench.step import run_step_bench

    run_step_bench(json_path=json)


@bench.command()
def baselines(json: JsonFile = None) -> None:
    """A step of each rival, without generation: advantage modification, screening, TDGA and more."""
    from verl_grad_routing.bench.baselines import run_baselines_bench

    run_baselines_bench(json_path=json)


@bench.command()
def grader(
    json: JsonFile = None,
    verdicts: Annotated[int, typer.Option(min=1, help="Verdicts to reach.")] = 1000,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="No sandbox: with your own rights.")] = False,
) -> None:
    """Verdicts per second on candidate programs, each in a sandbox of its own, on all cores."""
    from verl_grad_routing.bench.grader import run_grader_bench

    run_grader_bench(json_path=json, verdicts=verdicts, unsafe=unsafe)


@bench.command()
def run(
    environment: Annotated[Path, typer.Argument(help="Folder that `vgr prepare loopholes` wrote.")],
    json: JsonFile = None,
    pairs: Annotated[int, typer.Option(min=2, help="Runs of each arm.")] = 4,
    steps: Annotated[int, typer.Option(min=8, help="Steps of each run; the first three are dropped.")] = 15,
) -> None:
    """A whole step of real runs, generation and weight sync included: routed against unrouted."""
    from verl_grad_routing.bench.run import run_whole_bench

    run_whole_bench(environment, json_path=json, pairs=pairs, steps=steps)


@app.command("warm-up")
def warm_up_command(
    model: Annotated[Path, typer.Argument(help="Folder of the model to start from; it stays as it is.")],
    to: Annotated[Path, typer.Option("--to", help="File for the basis: name.safetensors.")],
    pairs: Annotated[str | None, typer.Option(help="Contrastive pairs; their wanted sides are the clean data.")] = None,
    data: Annotated[Path | None, typer.Option(help="Clean conversations instead: parquet with `messages`.")] = None,
    rank: Annotated[int, typer.Option(help="Directions to keep of every matrix.")] = 10,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step; all pairs, or 32 conversations.")] = None,
    ranks: Annotated[int, typer.Option(help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data's order.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of verl's SFT trainer: key=value.")
    ] = None,
    chat: Chat = None,
) -> None:
    """Warm a model up on clean data and keep the directions in which it moved, for TDGA (preset tdga)."""
    from verl_grad_routing.chat import parse_switches
    from verl_grad_routing.warm_up import WarmUp, warm_up
    from verl_grad_routing.warm_up.command import describe

    given = (tuple(overrides or ()), parse_switches(chat))
    settings = WarmUp(model, pairs, data, rank, steps, lr, batch_size, ranks, seed, *given)
    for line in describe(warm_up(settings, to), to):
        print(line)


@app.command()
def drift(
    first: Annotated[Path, typer.Argument(help="A checkpoint folder of a run (global_step_N), or a warm-up's basis.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same model.")],
    rank: Annotated[int, typer.Option(help="Directions of each matrix to compare.")] = 5,
    json: JsonFile = None,
) -> None:
    """How far two changes of a model point in the same directions: 1 the same subspaces, 0 orthogonal ones."""
    from json import dumps

    from verl_grad_routing.deploy.changes import checkpoint_basis
    from verl_grad_routing.subspaces import drift as overlaps
    from verl_grad_routing.subspaces import load_basis

    one, other = (checkpoint_basis(p, rank) if p.is_dir() else load_basis(p, rank) for p in (first, second))
    found = overlaps(one, other)
    width = max(map(len, found))
    for name, overlap in found.items():
        print(f"{name:<{width}}  {overlap:.3f}")
    print(f"{'mean':<{width}}  {sum(found.values()) / len(found):.3f}")
    if json is not None:
        json.write_text(dumps(found, indent=2))


@app.command()
def demo(to: To = Path("demo")) -> None:
    """Prepare a small environment, train it unrouted and routed, and compare; made for two cores."""
    from verl_grad_routing.compare.demo import run_demo

    run_demo(to)


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="A grid: arms, environments, seeds; see recipes/comparison.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder of the comparison; the grid's name by default.")
    ] = None,
) -> None:
    """Run every cell of a grid that is not finished yet, and print the tables; exit status 1 if any cell failed."""
    from verl_grad_routing.compare.execute import run_grid, show

    outcome = run_grid(grid, to)
    show(outcome)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with metrics.jsonl, or results of vgr compare.")],
    to: To = Path("report"),
    allow_mixed_versions: Annotated[
        bool, typer.Option("--allow-mixed-versions", help="Accept results of different package versions.")
    ] = False,
    into: Annotated[
        list[Path] | None,
        typer.Option(help="Markdown file: the rates of a comparison also go between its marks there; may be repeated."),
    ] = None,
) -> None:
    """Compare runs, or show a comparison's results: tables and a page with figures."""
    for run in runs:
        if not run.is_dir():
            fix = "no such folder; give run folders that hold metrics.jsonl, or the results folder of a comparison"
            raise UserError("RUNS", str(run), fix)
    from verl_grad_routing.compare.embed import embed
    from verl_grad_routing.compare.report import write_report
    from verl_grad_routing.compare.results import is_results

    if into and not is_results(runs[0]):
        raise UserError("--into", str(into[0]), f"{runs[0]} is no results folder of vgr compare, which this needs")
    write_report(runs, to, allow_mixed_versions)
    for page in into or ():
        embed(runs[0], page, allow_mixed_versions)


app.add_typer(probe_command.app, name="probe")
app.add_typer(self_report_commands.app, name="self-report")
app.command("interrogate")(self_report_commands.interrogate)
app.command("rft")(rft_command)
app.command("retain")(retain.retain)
app.command()(pairs)
app.command()(contrast)
app.command()(expand)
app.command()(leakage)
app.command()(relearn)
app.command()(token_weights)
bench.command()(routing)


def _presets() -> list[tuple[str, str]]:
    """Name and first comment of every preset that ships; files that start with an underscore are parts of others."""
    folder = resources.files("verl_grad_routing").joinpath("conf").joinpath("grad_routing")
    rows = []
    for file in folder.iterdir():
        if not file.name.endswith(".yaml") or file.name.startswith("_"):
            continue
        lines = [line.strip().lstrip("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
        rows.append((file.name.removesuffix(".yaml"), next((ln for ln in lines if not ln.startswith("@package")), "")))
    return sorted(rows)


def _with_external(registry: Mapping[str, type]) -> list[tuple[str, str]]:
    from verl_grad_routing.registry import load_external_methods

    load_external_methods()
    return [(name, _first_line(registry[name])) for name in sorted(registry)]


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _detectors() -> list[tuple[str, str]]:
    from verl_grad_routing.detectors import DETECTORS

    rows = _with_external(DETECTORS)
    width = max((len(str(DETECTORS[name].signal)) for name, _ in rows), default=0)
    return [(name, f"{DETECTORS[name].signal!s:<{width}}  {text}") for name, text in rows]


def _gates() -> list[tuple[str, str]]:
    from verl_grad_routing.gates import GATES

    return _with_external(GATES)


def _interventions() -> list[tuple[str, str]]:
    from verl_grad_routing.interventions import INTERVENTIONS

    return _with_external(INTERVENTIONS)


def _hooks() -> list[tuple[str, str]]:
    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS

    return _with_external(ENGINE_HOOKS)


def _bases() -> list[tuple[str, str]]:
    from verl_grad_routing.registry import load_external_methods
    from verl_grad_routing.routing import INITIALISATIONS

    load_external_methods()
    return [(name, _first_line(INITIALISATIONS[name])) for name in sorted(INITIALISATIONS)]


def _forms() -> list[tuple[str, str]]:
    from verl_grad_routing.registry import load_external_methods
    from verl_grad_routing.routing import FORMS

    load_external_methods()
    return [(name, _first_line(type(FORMS[name]))) for name in sorted(FORMS)]


def _environments() -> list[tuple[str, str]]:
    from verl_grad_routing.envs import ENVIRONMENTS, describe

    return [(name, describe(name)) for name in sorted(ENVIRONMENTS)]


tables.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``vgr``. Bad input is one line on stderr and exit status 2.

    Args:
        arguments: Command line without the program's name; ``sys.argv`` by default.
    """
    try:
        app(args=arguments)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.exit(_complain(f"{error.name} is not installed: in its clone, pip install -e '.[{extra}]'"))
    except BrokenPipeError:  # `vgr list ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _complain(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
