"""Which detector goes with which intervention, and everything that is asked of methods in shadow."""

from __future__ import annotations

import copy
import dataclasses

from verl_grad_routing.errors import UserError
from verl_grad_routing.shadows import KEY, Shadow, build_shadows, told_of
from verl_grad_routing.training.checks import methods
from verl_grad_routing.training.checks.run import Run

# What each shadow must pass as the run's own method must.
ASKED = (methods.passes, methods.pairs, methods.groups, methods.fingerprints, methods.layers)


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
        raise UserError("grad_routing.compare_gradients_every", every, f"nothing to compare with; set {KEY}")
    if found and not run.routed:
        fix = "methods in shadow need the two blocks; take preset vanilla_2r for an unrouted run"
        raise UserError(KEY, [shadow.name for shadow in found], fix)
    for shadow in found:
        with told_of(shadow.name):
            for one in (combination, *ASKED):
                one(_as_arm(run, shadow))


def _as_arm(run: Run, shadow: Shadow) -> Run:
    """``run`` with the shadow's method as its own."""
    changed = copy.copy(run)
    changed.methods = shadow.methods
    changed.settings = dataclasses.replace(run.settings, **shadow.settings)
    return changed
