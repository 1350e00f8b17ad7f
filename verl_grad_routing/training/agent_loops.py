"""The agent loops that this package adds to verl's registry."""

from __future__ import annotations

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_grad_routing.training.request_seeds import SeededRequests
from verl_grad_routing.training.two_adapters import CHOOSING, SEEDED
from verl_grad_routing.training.two_adapters.request import ChosenAdapter


@register(SEEDED)
class SeededSingleTurn(SeededRequests, ChosenAdapter, SingleTurnAgentLoop):
    """verl's agent loop of one turn with seeded requests, which also name their adapter where there are two."""


@register(CHOOSING)
class ChoosingSingleTurn(ChosenAdapter, SingleTurnAgentLoop):
    """verl's agent loop of one turn whose requests name their adapter, and have no seeds."""
