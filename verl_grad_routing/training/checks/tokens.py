"""What routes of tokens ask of detector, gate, intervention and the rest."""

from __future__ import annotations

from verl_grad_routing.errors import UserError
from verl_grad_routing.shadows import KEY, build_shadows, told_of
from verl_grad_routing.training.checks.run import Run

GATE = "grad_routing.gate"


def token_routes(run: Run) -> None:
    """A gate on tokens needs scores of tokens and an intervention that takes their routes."""
    gate, settings = run.methods.gate, run.settings
    if not (run.routed and gate.per_token):
        return
    detector, intervention = run.methods.detector, run.methods.intervention
    if not detector.scores_tokens:
        fix = f"detector {detector.name} scores rollouts, not tokens; take persona_act, or a gate on rollouts"
        raise UserError(f"{GATE}.name", gate.name, fix)
    if not intervention.takes_token_routes:
        fix = (
            f"intervention {intervention.name} acts on whole rollouts; take route, sgtm or cloud, or a gate on rollouts"
        )
        raise UserError(f"{GATE}.name", gate.name, fix)
    if gate.needs_pair_means and getattr(detector.config, "token_score", None) == "cosine":
        fix = f"gate {gate.inner.name} compares with what the pairs project to; set projection"
        raise UserError("grad_routing.detector.token_score", "cosine", fix)
    if settings.quarantine_off_share:
        fix = "rollouts sampled with the quarantine off are judged as a whole; set 0.0, or a gate on rollouts"
        raise UserError("grad_routing.quarantine_off_share", settings.quarantine_off_share, fix)
    if settings.compare:
        fix = "methods in shadow are compared by the routes of rollouts; leave it empty with a gate on tokens"
        raise UserError(KEY, list(settings.compare), fix)


def rollout_gate(run: Run) -> None:
    """Settings of tokens that a gate on rollouts would leave without effect, and a gate on tokens inside such a one."""
    if not run.routed or run.methods.gate.per_token:
        return
    config, gate = run.methods.detector.config, run.methods.gate
    if getattr(config, "asks_for_tokens", False):
        fix = f"gate {gate.name} decides on rollouts and never asks for scores of tokens; set gate.name=per_token"
        key = "token_window" if config.token_window != 1 else "token_score"
        raise UserError(f"grad_routing.detector.{key}", getattr(config, key), fix)
    inner = getattr(gate, "inner", None)
    if inner is not None and inner.per_token:
        fix = f"{gate.name} decides on rollouts; put it inside per_token instead"
        raise UserError(f"{GATE}.inner.name", inner.name, fix)


def shadows(run: Run) -> None:
    for shadow in build_shadows(run.settings) if run.routed else ():
        with told_of(shadow.name):
            if shadow.methods.gate.per_token:
                fix = "methods in shadow are compared by the routes of rollouts; give it a gate on rollouts"
                raise UserError(f"{GATE}.name", shadow.methods.gate.name, fix)


def token_weights(run: Run) -> None:
    """The table of token weights is there, is of a vocabulary at least as large as the model's, and has an effect."""
    key, intervention = "grad_routing.intervention.token_weights", run.methods.intervention
    weights_V = intervention.token_weights_V if run.routed else None
    if weights_V is None:
        return
    if run.settings.compare:
        fix = "methods in shadow are compared by the routes of rollouts; leave it empty with weights of tokens"
        raise UserError(KEY, list(run.settings.compare), fix)
    size = run.shape_number("vocab_size")
    if size is not None and len(weights_V) < size:
        fix = f"it has {len(weights_V)} tokens and the model {size}; write it with vgr token-weights and this model"
        raise UserError(key, intervention.config.token_weights, fix)
