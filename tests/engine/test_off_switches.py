"""Switched off, every method leaves the weights that vanilla leaves on the same batches, bit for bit.

From the recorded batch on: detector, gate, intervention, verl's own advantages, masks, two steps of the real engine.
"""

from __future__ import annotations

import pytest

from tests.engine.off_switches import SWITCHES, settings
from verl_grad_routing.cards import method_cards
from verl_grad_routing.interventions import INTERVENTIONS

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("name", SWITCHES)
def test_off_is_vanilla_bit_for_bit(name, worlds):
    assert worlds(1)["off_switches"][name]["off"] == []


@pytest.mark.parametrize("name", [name for name, switch in SWITCHES.items() if switch.acts])
def test_and_on_it_acts_on_these_batches(name, worlds):
    assert worlds(1)["off_switches"][name]["on"]


def test_no_method_is_left_out():
    presets = {switch.preset for switch in SWITCHES.values()}
    assert [name for name, card in method_cards().items() if not presets & set(card.shipped)] == []
    used = {settings(switch, on=False)["intervention"]["name"] for switch in SWITCHES.values()}
    assert {name for name in INTERVENTIONS if INTERVENTIONS[name].__module__.startswith("verl_grad_routing")} == used
    hooks = {hook["name"] for switch in SWITCHES.values() for hook in settings(switch, on=False)["blocks"]["hooks"]}
    assert hooks == {"project_update", "regularize_gradient", "l1_activations"}
