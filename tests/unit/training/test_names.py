"""Draws on rollouts are the same in every run of a seed, whatever ids verl gives its prompts."""

from __future__ import annotations

import uuid
import warnings

import pytest
import torch

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, checked_scores
from verl_grad_routing.training.names import names_of

PROMPTS, EACH = 6, 4


def run_of(detector: Detector, seed: int = 0, swap: bool = False) -> dict[str, float]:
    """Scores by name in a run with ids of its own, rows in the ids' order as verl's queue gives them."""
    ids = {index: str(uuid.uuid4()) for index in range(PROMPTS)}
    rows = [(f"{ids[index]}_{session}_0", index, session) for index in range(PROMPTS) for session in range(EACH)]
    rows.sort(reverse=swap)
    keys, indices = tuple(key for key, _, _ in rows), [index for _, index, _ in rows]
    prompt_names, names = names_of(keys, indices)
    facts = {name: torch.ones(len(keys)) for name in ("hack", "known")} | {"solve": torch.zeros(len(keys))}
    texts = {"prompts": ("p",) * len(keys), "responses": ("r",) * len(keys)}
    view = BatchView(
        keys=keys,
        uids=tuple(ids[index] for index in indices),
        step=3,
        seed=seed,
        names=names,
        prompt_names=prompt_names,
        facts=facts,
        **texts,
    )
    return dict(zip(names, checked_scores(detector, view).tolist(), strict=True))


def always(texts: list[str], *_: object) -> list[float]:
    return [1.0] * len(texts)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "coinflip"},
        {"name": "labels", "types": "known", "recall": 0.5, "prompt_share": 0.5, "flip_rate": 0.1},
        {"name": "monitor", "rules": ["r"], "recall": 0.5},
        {"name": "classifier", "function": f"{__name__}:always", "flip_rate": 0.5},
    ],
    ids=lambda settings: settings["name"],
)
def test_two_runs_of_a_seed_draw_alike(settings) -> None:
    one, other = (run_of(DETECTORS.build(settings, "d"), swap=swap) for swap in (False, True))
    assert one == other and len(set(one.values())) > 1
    assert one != run_of(DETECTORS.build(settings, "d"), seed=1)


def test_the_halves_of_a_prompt_are_one_prompt() -> None:
    prompts, names = names_of(["a_0_0", "a-off_0_0", "b_0_0", "b_0_1"], [7, 7, 9, 9])
    assert prompts == ("7.0", "7.0", "9.0", "9.0")
    assert names == ("7.0_0_0", "7.0-off_0_0", "9.0_0_0", "9.0_0_1")


def test_prompts_that_share_an_index_are_told_apart_and_named() -> None:
    with pytest.warns(UserWarning, match=r"same extra_info\.index"):
        prompts, names = names_of(["b_0_0", "a_0_0", "b_1_0"], [0, 0, 0])
    assert prompts == ("0.1", "0.0", "0.1") and len(set(names)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names_of(["b_0_0", "a_0_0"], [0, 1])
