"""What a detector of gradients asks of engine and model."""

from __future__ import annotations

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run


def gradient_pass(run: Run) -> None:
    """What the backward pass that scores rollouts cannot do."""
    if not (run.routed and run.methods.detector.needs_gradients):
        return
    sequence = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    for key, plain in ((sequence, 1), ("actor_rollout_ref.model.enable_activation_offload", False)):
        value = run.get(key, plain)
        if value != plain:
            raise UserError(key, value, f"set {str(plain).lower()}: gradients of rollouts need it")


def bottleneck_rank(run: Run) -> None:
    """A rank above the residual stream's width; narrower layers are found when the model is there."""
    config = run.methods.detector.config
    if not run.reads_activations or config.coordinates == "residual":
        return
    width = run.shape_number("hidden_size")
    if width is not None and config.rank > width:
        raise UserError("grad_routing.detector.rank", config.rank, f"the model is {width} wide; give at most that")
