"""Figures of the pages' failure modes, each computed by this package's own code: python docs/failure_figures.py

They show what the rules do by themselves, in worked cases; no model is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from verl_grad_routing.compare.figures import OKABE_ITO, STYLE, to_svg
from verl_grad_routing.compare.leakage import BaselineCurve, leakage
from verl_grad_routing.detectors.evaluation import auroc
from verl_grad_routing.directions.activation import difference_of_means, project
from verl_grad_routing.directions.controls import haar_directions
from verl_grad_routing.gates import GATES
from verl_grad_routing.routing import Route, block_masks, routed_lora
from verl_grad_routing.token_weights import Frequencies

TO = Path(__file__).parent / "assets" / "methods"
Curves = dict[str, tuple[list[float], list[float]]]  # label -> (x, y)


def frozen_block(steps: int = 40) -> Curves:
    """A parameter at 1 with one gradient of its own, then only other blocks' steps, under AdamW(.9, .95), decay .1."""

    def run(zeroed: bool) -> list[float]:
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        values = [1.0]
        for step in range(steps):
            own = torch.ones_like(parameter) if step == 0 else None
            parameter.grad = torch.zeros_like(parameter) if own is None and zeroed else own
            optimizer.step()
            values.append(parameter.item())
        return values

    x = [float(step) for step in range(steps + 1)]
    return {"gradient zeroed": (x, run(True)), "not stepped (freeze_inactive)": (x, run(False))}


def clipping(limit: float = 1.0, deployed: float = 0.3) -> Curves:
    """What is left of a deployed gradient of norm .3 beside a quarantine's of another norm, under a limit of 1."""
    norms = [8 * index / 100 for index in range(1, 101)]

    def left(jointly: bool, other: float) -> float:
        own, quarantine = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        own.grad, quarantine.grad = torch.tensor([deployed]), torch.tensor([other])
        torch.nn.utils.clip_grad_norm_([own, quarantine] if jointly else [own], limit)
        return float(own.grad)

    return {
        "one norm over both": (norms, [left(True, norm) for norm in norms]),
        "each its own (default)": (norms, [left(False, norm) for norm in norms]),
    }


def two_blocks(weights: tuple[float, float, float], rate: float, steps: int) -> list[tuple[float, float]]:
    """(deployed, quarantine) of y = d + q by gradient descent through the routed kernel, ABSORB, ROUTE and KEEP rows.

    ABSORB rows want 2, ROUTE rows 1, KEEP rows 2, each weighted.
    """
    ones = torch.ones(2, 1, dtype=torch.float64)
    gate, update = (mask.double() for mask in block_masks([Route.ABSORB, Route.ROUTE, Route.KEEP]))
    targets, weigh = (torch.tensor(values, dtype=torch.float64) for values in ((2.0, 1.0, 2.0), weights))

    def gradient(at: list[float]) -> torch.Tensor:
        B = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        y = routed_lora(ones.new_ones(3, 1), ones, B[None], gate, update, 1.0)[:, 0]
        return torch.autograd.grad((weigh * (y - targets) ** 2).sum(), B)[0]

    offset = gradient([0.0, 0.0])
    slopes = torch.stack([gradient([1.0, 0.0]) - offset, gradient([0.0, 1.0]) - offset], dim=1)  # it is affine
    (a, b), (c, e) = slopes.tolist()
    u, v = offset.tolist()
    path = [(0.0, 0.0)]
    for _ in range(steps):
        d, q = path[-1]
        path.append((d - rate * (a * d + b * q + u), q - rate * (c * d + e * q + v)))
    return path


def tug_of_war(steps: int = 4001) -> Curves:
    """Opposed targets for the blocks' sum; a clean pass without the quarantine bounds them."""
    found: Curves = {}
    for said, weights in (("", (1.0, 1.0, 0.0)), (", with KEEP rows", (1.0, 1.0, 0.2))):
        path = two_blocks(weights, 0.01, steps)[::50]
        x = [50.0 * index for index in range(len(path))]
        found[f"deployed{said}"] = (x, [d for d, _ in path])
        found[f"quarantine{said}"] = (x, [q for _, q in path])
    return found


def absorbed(steps: int = 60) -> Curves:
    """How much of what nobody labels the deployed block learns, after a head start in which the quarantine alone does.

    Unlabelled rows (ABSORB) want 2; during the head start they train the quarantine alone.
    """
    gate, update = (mask.double() for mask in block_masks([Route.ABSORB]))
    closed = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(2, 1, dtype=torch.float64)
    starts = list(range(0, steps + 1, 2))
    share = []
    for start in starts:
        B = torch.zeros(2, dtype=torch.float64)
        for step in range(steps):
            B.requires_grad_()
            y = routed_lora(ones.new_ones(1, 1), ones, B[None], gate, closed if step < start else update, 1.0)
            (gradient,) = torch.autograd.grad((y - 2).square().sum(), B)
            B = (B - 0.02 * gradient).detach()
        share.append(float(B[0] / B.sum()))
    return {"deployed block's share": ([float(start) for start in starts], share)}


def fixed_share(rollouts: int = 128, route: float = 0.75) -> Curves:
    """A perfect detector under a gate that routes a fixed share: what is right of what it routes, by true hack rate."""
    x, precision, recall = [], [], []
    for hacks in range(4, rollouts + 1, 4):
        scores = torch.cat([torch.linspace(1, 2, hacks), torch.linspace(-1, 0, rollouts - hacks)]).double()
        gate = GATES.build({"name": "batch_quantile", "route": route, "keep": 0.0}, "gate")
        routed = gate.decide(scores, 1).routes_B == int(Route.ROUTE)
        right = int(routed[:hacks].sum())
        x.append(hacks / rollouts)
        precision.append(right / int(routed.sum()))
        recall.append(right / hacks)
    return {"routed rollouts that hack": (x, precision), "hacks that are routed": (x, recall)}


def flags(recall: float = 0.9) -> Curves:
    """Share of flags that is right, by the true hack rate, for a labeller of 90% recall."""
    x = [index / 200 for index in range(1, 201)]
    found: Curves = {}
    for wrong in (0.01, 0.05, 0.2):
        right = [recall * rate / (recall * rate + wrong * (1 - rate)) for rate in x]
        found[f"{wrong:.0%} false positives"] = (x, right)
    return found


def rare_tokens() -> Curves:
    """Weight of a token that is five times as frequent in forget texts as in retain texts, by how often it was seen."""
    counts = [2.0**power for power in range(11)]
    found: Curves = {}
    for pseudo in (20.0, 1.0):
        weights = []
        for count in counts:
            forget, retain = torch.tensor([5 * count, 1e5]), torch.tensor([count, 1e5])
            weights.append(float(Frequencies(retain_pseudo=pseudo).weights(forget, retain)[0]))
        found[f"{pseudo:g} retain pseudo-counts"] = (counts, weights)
    return found


def small_groups() -> Curves:
    """Standard error of a group's mean reward at a hack rate of one half, of all rollouts and of a quarter of them."""
    x = [float(size) for size in range(4, 33, 4)]
    return {
        "together": (x, [0.5 / math.sqrt(size) for size in x]),
        "apart: the quarter sampled without it": (x, [0.5 / math.sqrt(size / 4) for size in x]),
    }


def short_answers(samples: int = 24) -> Curves:
    """Norm of the gradient of an answer's mean loss, by its length: random answers of an untrained character model."""
    from verl_grad_routing.envs.chars.model import new_model
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    model, draw = new_model(ALPHABET, 0), torch.Generator().manual_seed(0)
    lengths, norms = [1, 2, 4, 8, 16], []
    for length in lengths:
        found = []
        for _ in range(samples):
            tokens_1T = torch.randint(0, len(ALPHABET.tokens), (1, 8 + length), generator=draw)
            logits_TV = model(input_ids=tokens_1T).logits[0, 7:-1]
            loss = torch.nn.functional.cross_entropy(logits_TV, tokens_1T[0, 8:])
            gradients = torch.autograd.grad(loss, list(model.model.layers.parameters()))
            found.append(float(torch.nn.utils.get_total_norm(gradients)))
        norms.append(sum(found) / samples)
    return {"mean norm": ([float(length) for length in lengths], norms)}


def saturation(undiscovered: float = 0.2) -> Curves:
    """Leakage by the run's hack rate, three points more and less of it, on a baseline curve that flattens.

    Baselines of 0 to 40% undesired data, hack rates 0.9 (1 - exp(-10 amount)).
    """
    amounts = (0.0, 0.05, 0.1, 0.2, 0.4)
    curve = BaselineCurve(amounts, tuple(0.9 * (1 - math.exp(-10 * amount)) for amount in amounts))
    rates = [index / 100 for index in range(3, 86)]

    def read(off: float) -> list[float]:
        return [leakage(curve, rate + off, undiscovered) for rate in rates]

    return {
        "as measured": (rates, read(0)),
        "3 points more": (rates, read(0.03)),
        "3 points less": (rates, read(-0.03)),
        "without interpolation": (rates, [-math.log(1 - rate / 0.9) / 10 / undiscovered for rate in rates]),
    }


Sides = tuple[torch.Tensor, torch.Tensor]


def sides(pairs: int, shift: float, accident: float, truth_2d: torch.Tensor, draw: torch.Generator) -> Sides:
    """(unwanted, wanted) activations [P, 1, d] of pairs: noise of variance 1 a dimension, and a shift between them.

    The shift lies along the first row of ``truth_2d``, and ``accident`` times as much of it along the second.
    """
    shape = (pairs, 1, truth_2d.shape[1])
    wanted, noise = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return noise + shift * (truth_2d[0] + accident * truth_2d[1]), wanted


def few_pairs(draws: int = 20, dimensions: int = 256) -> Curves:
    """Cosine between the direction of some pairs and the true one, by the number of pairs, mean over draws."""
    truth_2d, draw = haar_directions(2, [1], dimensions, 0)[:, 0].double(), torch.Generator().manual_seed(0)
    counts = [2, 4, 8, 16, 32, 64]
    found: Curves = {}
    for shift in (8.0, 4.0):
        cosines = []
        for pairs in counts:
            made = [difference_of_means(*sides(pairs, shift, 0.0, truth_2d, draw)) for _ in range(draws)]
            cosines.append(sum(float(one.vectors_Ld[0].double() @ truth_2d[0]) for one in made) / draws)
        found[f"sides {shift:g} standard deviations apart"] = ([float(pairs) for pairs in counts], cosines)
    return found


def accident(draws: int = 20, dimensions: int = 256, rollouts: int = 200) -> Curves:
    """Ten pairs whose sides also differ in something else, which rollouts have whatever they do: mean over draws.

    Rollouts vary along it as much as hacks and others are apart, 4 standard deviations of the noise.
    """
    truth_2d, draw = haar_directions(2, [1], dimensions, 0)[:, 0].double(), torch.Generator().manual_seed(0)
    x, held_out, separates = [index / 2 for index in range(9)], [], []
    hack_B = torch.arange(2 * rollouts) < rollouts
    for size in x:
        accuracy = area = 0.0
        for _ in range(draws):
            direction = difference_of_means(*sides(10, 4.0, size, truth_2d, draw))
            rows_B1d = torch.randn(2 * rollouts, 1, dimensions, generator=draw, dtype=torch.float64)
            of_its_own_B = torch.randn(2 * rollouts, generator=draw, dtype=torch.float64)
            rows_B1d += 4 * (hack_B[:, None] * truth_2d[0] + of_its_own_B[:, None] * truth_2d[1])[:, None]
            accuracy += direction.held_out_accuracy / draws
            area += auroc(project(rows_B1d, direction.vectors_Ld[None])[:, 0], hack_B) / draws
        held_out.append(accuracy)
        separates.append(area)
    return {"held-out pairs in order": (x, held_out), "AUROC among rollouts": (x, separates)}


FIGURES: dict[str, tuple[Callable[[], Curves], str, str, str]] = {
    "frozen_block": (frozen_block, "steps of other blocks", "parameter", "linear"),
    "clipping": (clipping, "norm of the quarantine's gradient", "deployed gradient left", "linear"),
    "tug_of_war": (tug_of_war, "step", "block", "linear"),
    "absorbed": (absorbed, "steps of head start, of 60", "share in the deployed block", "linear"),
    "fixed_share": (fixed_share, "true hack rate", "share", "linear"),
    "flags": (flags, "true hack rate", "flags that are right", "linear"),
    "rare_tokens": (rare_tokens, "times seen in retain texts", "weight (1: not routed)", "log"),
    "short_answers": (short_answers, "tokens of the answer", "norm of its gradient", "linear"),
    "saturation": (saturation, "hack rate of the run", "leakage", "linear"),
    "few_pairs": (few_pairs, "pairs", "cosine with the true direction", "linear"),
    "accident": (accident, "size of the other difference", "share", "linear"),
    "small_groups": (small_groups, "rollouts of a prompt", "standard error of the baseline", "linear"),
}


def draw(name: str) -> str:
    """The figure as SVG text."""
    curves, across, up, scale = FIGURES[name]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axis: Axes = figure.subplots()
        for index, (label, (x, y)) in enumerate(curves().items()):
            axis.plot(x, y, label=label, color=OKABE_ITO[index], linestyle=("-", "--", "-.", ":")[index % 4])
        axis.set(xlabel=across, ylabel=up, xscale=scale)
        axis.legend()
        return to_svg(figure)


if __name__ == "__main__":
    TO.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (TO / f"{name}.svg").write_text(draw(name), encoding="utf-8")
        print(TO / f"{name}.svg")
