"""Which detector goes with which intervention, and everything that is asked of methods in shadow."""

from __future__ import annotations

import copy
import dataclasses

from verl_grad_routing.errors import UserError
from verl_grad_routing.shadows import KEY, Shadow, build_shadows, told_of
from verl_grad_routing.training.checks import gradients, methods, model, monitors, tokens
from verl_grad_routing.training.checks.run import Run

# What each shadow must pass as the run's own method must.
ASKED = (
    *(methods.passes, methods.pairs, methods.groups, methods.fingerprints, methods.layers),
    *(model.kind, gradients.gradient_pass, gradients.bottleneck_rank, monitors.probe_model, tokens.token_weights),
)
GRADIENTS = "grad_routing.compare_gradients_every"


def combination(run: Run) -> None:
    """The rule of the table of combinations."""
    if not run.routed:
        return
    reason = run.methods.intervention.works_with(type(run.methods.detector))
    if reason is not None:
        fix = f"cannot act on detector {run.settings.detector['name']}: {reason}; see `vgr combinations`"
        raise UserError("grad_routing.intervention.name", run.settings.intervention["name"], fix)


def shadows(run: Run) -> None:
    found = build_shadows(run.settings)
    every = run.settings.compare_gradients_every
    if every and not found:
        raise UserError(GRADIENTS, every, f"nothing to compare with; set {KEY}")
    if found and not run.routed:
        fix = "methods in shadow need the two blocks; take preset vanilla_2r for an unrouted run"
        raise UserError(KEY, [shadow.name for shadow in found], fix)
    if every:
        _comparable_gradients(run)
    for shadow in found:
        with told_of(shadow.name):
            for one in (combination, *ASKED):
                one(_as_arm(run, shadow))


def _comparable_gradients(run: Run) -> None:
    """Refuse runs whose gradient is more than what advantages and routes make of the policy's loss."""
    from verl_grad_routing.training.block_kinds import BLOCK_KINDS
    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS
    from verl_grad_routing.training.hooks import EngineHook

    every, blocks = run.settings.compare_gradients_every, run.settings.blocks
    apart = BLOCK_KINDS[blocks.kind].compares_gradients
    reasons = {
        f"blocks.kind={blocks.kind}, whose gradients are not apart by parameter": not apart,
        "confessions, whose loss is none of the methods'": run.settings.confessions.share > 0,
    }
    for settings in blocks.hooks:
        adds = ENGINE_HOOKS[settings["name"]].extra_loss is not EngineHook.extra_loss
        reasons[f"the hook {settings['name']}, which adds to the loss"] = adds
    for reason, there in reasons.items():
        if there:
            raise UserError(GRADIENTS, every, f"set 0 with {reason}")


def _as_arm(run: Run, shadow: Shadow) -> Run:
    """``run`` with the shadow's method as its own."""
    changed = copy.copy(run)
    changed.methods = shadow.methods
    changed.settings = dataclasses.replace(run.settings, **shadow.settings)
    return changed
