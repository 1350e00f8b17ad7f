"""Everything about a configuration that can be known to fail before Ray starts, each as one line.

The configuration is verl's whole tree as a plain mapping. Checks are small functions in ``CHECKS``; each raises
``UserError`` and knows one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verl_grad_routing.directions.pairs import GIVE_OVERRIDE
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks import (
    bases,
    combinations,
    confessions,
    gradients,
    labels,
    methods,
    model,
    monitors,
    sampling,
    start,
    tokens,
    warm_up,
)
from verl_grad_routing.training.checks.run import MISSING, Run, get

__all__ = ["CHECKS", "check"]

CHECKS: tuple[Callable[[Run], None], ...] = (
    start.mandatory_values,
    start.trainer_mode,
    start.files,
    model.strategies,
    model.kind,
    model.adapter,
    bases.basis,
    bases.form,
    bases.precision,
    bases.optimisation,
    model.merge,
    methods.passes,
    methods.correction,
    warm_up.card,
    methods.pairs,
    methods.rescoring,
    methods.unit_weights,
    methods.groups,
    methods.fingerprints,
    gradients.gradient_pass,
    gradients.bottleneck_rank,
    labels.trusted_column,
    methods.schedules,
    methods.hooks,
    methods.layers,
    monitors.probe_model,
    monitors.inoculation,
    confessions.judge,
    confessions.rows,
    confessions.seams,
    confessions.replayed,
    confessions.lengths,
    sampling.two_adapters,
    sampling.quarantine_off,
    sampling.filtered_groups,
    tokens.token_routes,
    tokens.rollout_gate,
    tokens.shadows,
    tokens.token_weights,
    combinations.combination,
    combinations.shadows,
    start.replay,
    start.versions,
    start.machine,
    start.registrations,
)


def check(config: Mapping[str, Any]) -> None:
    """Run every check on verl's configuration as a plain mapping. Raises ``UserError``."""
    if MISSING in (get(config, "grad_routing.detector.pairs"),):
        raise UserError("grad_routing.detector.pairs", MISSING, GIVE_OVERRIDE)
    run = Run(config)
    for one in CHECKS:
        one(run)
