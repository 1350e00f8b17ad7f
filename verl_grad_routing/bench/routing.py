"""What each way to route costs in one ``update_actor``, against the same update unrouted, interleaved, one process.

Rows are a registry: a row names what it is measured against, how both are set up, and the bound that the upper end of
the ratio's interval must not exceed. Adapter rows run the embedded environment's model and batch (128 rollouts, KL
reference on, see ``bench.step``) with the blocks and the routing table of a preset.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.bench.statistics import interleave, ratio_interval
from verl_grad_routing.bench.step import (
    CPU_THREADS,
    ROLLOUTS,
    build_engine,
    make_batch,
    make_loss,
    prepare,
    timed,
    update_actor,
)
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest
from verl_grad_routing.routing import DEFAULT, STRICT, Contrast, Route, RoutingTable, save_contrast

Work = Callable[[], None]
ADAPTER_BOUND = 1.03
RANKS = {"deployed_rank": 8, "quarantine_rank": 8}
SHARES = {Route.ROUTE: 0.5, Route.ABSORB: 0.25, Route.KEEP: 0.25}
"""Routes of the routed batch: all three kernels' paths are taken."""


@dataclass(frozen=True)
class Row:
    """One measurement: ``routed`` and ``plain`` set up one update each in a folder that holds the model."""

    against: str
    bound: float
    routed: Callable[[Path], Work]
    plain: Callable[[Path], Work]


ROWS: dict[str, Row] = {}


def register_row(name: str, row: Row) -> None:
    """Add a row. Raises ``UserError`` when the name is taken."""
    if ROWS.setdefault(name, row) is not row:
        raise UserError("benchmark row", name, "already registered; pick another name")


def adapter_update(
    blocks: dict[str, Any], table: RoutingTable = DEFAULT, routed: bool = True
) -> Callable[[Path], Work]:
    """An update of two adapter blocks with these settings, over mixed routes or absorbing everything."""

    def make(folder: Path) -> Work:
        settings = dict(blocks)
        if "contrast" in settings:
            settings["contrast"] = str(_made_up_contrast(folder))
        engine = build_engine(folder, {**RANKS, **settings})
        batch, loss = make_batch(kl=True), make_loss(kl=True)
        counts = [round(ROLLOUTS * share) for share in SHARES.values()]
        mixed = torch.tensor([int(route) for route in SHARES]).repeat_interleave(torch.tensor(counts))
        routes = mixed[torch.randperm(ROLLOUTS)] if routed else torch.full((ROLLOUTS,), int(Route.ABSORB))
        return lambda: update_actor(engine, batch, routes, table, loss)

    return make


def _made_up_contrast(folder: Path) -> Path:
    """Differences of ten pairs for every linear layer: the cost of an update does not depend on what they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from verl_grad_routing.warm_up.command import linear_modules

    path = folder / "contrast.safetensors"
    if not path.exists():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        sizes = {name: model.get_submodule(name).in_features for name in linear_modules(folder)}
        save_contrast(Contrast({name: torch.randn(10, size) + 1 for name, size in sizes.items()}), path)  # type: ignore[arg-type]
    return path


_VANILLA = adapter_update({}, routed=False)
for _name, _blocks, _table in (
    ("persona", {}, DEFAULT),
    ("strict", {}, STRICT),
    ("pissa", {"init": "pissa_split"}, DEFAULT),
    ("corda", {"init": "corda", "contrast": ""}, DEFAULT),
    ("scorda", {"init": "scorda", "contrast": ""}, DEFAULT),
    ("decay_to_start", {"optim": {"decay_to_start": True}}, DEFAULT),
):
    register_row(_name, Row("vanilla_2r", ADAPTER_BOUND, adapter_update(_blocks, _table), _VANILLA))


def run_routing_bench(
    json_path: Path | None = None, names: Sequence[str] | None = None, repeats: int = 30
) -> dict[str, Any]:
    """Measure, print one line a row, and write all samples to ``json_path``.

    Args:
        json_path: File for the numbers.
        names: Rows to measure; all if not given.
        repeats: Pairs of measurements of a row.

    Returns:
        ``rows``: name -> median ratio, interval, bound, whether the interval's upper end is within it, samples in
        seconds; beside the device.

    Raises:
        UserError: An unknown row.
    """
    import verl  # noqa: F401  (loads the plugin: the CPU platform must exist before any engine module)

    for name in names or ():
        if name not in ROWS:
            raise UserError("--row", name, nearest(name, list(ROWS)))
    torch.set_num_threads(CPU_THREADS)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in names or ROWS:
            row = ROWS[name]
            torch.manual_seed(0)
            routed, plain = row.routed(Path(folder)), row.plain(Path(folder))
            a, b = interleave(lambda work=routed: timed(work), lambda work=plain: timed(work), repeats)
            ratio = ratio_interval(a, b)
            within = ratio.high <= row.bound
            rows[name] = {**ratio.as_dict(), "against": row.against, "bound": row.bound, "within_bound": within}
            rows[name] |= {"routed_s": a, "plain_s": b}
            print(f"{name:16} / {row.against}: {ratio}, bound {row.bound}{'' if within else ': EXCEEDED'}", flush=True)
        torch.distributed.destroy_process_group()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {CPU_THREADS} thread"
    results = {"rows": rows, "device": device, "torch": torch.__version__}
    if json_path is not None:
        Path(json_path).write_text(json.dumps(results, indent=2))
    return results
