"""verl's synchronous trainer with routing in it: ``trainer.v1.trainer_mode=grad_routing``.

Everything that routing does not need is verl's sync mode, unchanged. One room a file: ``core`` builds and resumes,
``scoring`` reads activations in verl's passes, ``learning`` routes and shapes what is learned, ``sampling`` draws a
share of the rollouts without the quarantine, ``confessing`` adds confessions and keeps them apart, ``comparing`` asks
other methods in shadow, ``validation`` measures the model as it will be deployed.
"""

from __future__ import annotations

from verl.trainer.ppo.v1.trainer_base import register_trainer

from verl_grad_routing.training.trainer.comparing import Comparing
from verl_grad_routing.training.trainer.confessing import Confessing
from verl_grad_routing.training.trainer.validation import DeployedValidation

__all__ = ["GradRoutingTrainer"]


@register_trainer("grad_routing")
class GradRoutingTrainer(Comparing, DeployedValidation, Confessing):
    """verl's sync trainer that scores each batch, routes it, and validates as trained and as deployed."""
