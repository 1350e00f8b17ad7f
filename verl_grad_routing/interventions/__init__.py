"""Interventions: what happens to a rollout once it has a score and a route. ``INTERVENTIONS`` maps name to class."""

from verl_grad_routing.interventions import cloud as _cloud  # noqa: F401  (registers)
from verl_grad_routing.interventions import mask_advantage as _mask_advantage  # noqa: F401
from verl_grad_routing.interventions import modify_reward as _modify_reward  # noqa: F401
from verl_grad_routing.interventions import penalize as _penalize  # noqa: F401
from verl_grad_routing.interventions import route as _route  # noqa: F401
from verl_grad_routing.interventions import screen as _screen  # noqa: F401
from verl_grad_routing.interventions import sgtm as _sgtm  # noqa: F401
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged

__all__ = ["INTERVENTIONS", "Intervention", "Judged"]
