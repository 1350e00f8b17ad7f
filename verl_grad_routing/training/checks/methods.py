"""What detector, gate, intervention and hooks ask of the rest of the configuration."""

from __future__ import annotations

from verl_grad_routing.config import Methods
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.shadows import build_shadows, told_of
from verl_grad_routing.training.checks.run import Run

LATE = 10**9  # a step after every schedule


def passes(run: Run) -> None:
    bypass = run.get("algorithm.rollout_correction.bypass_mode", False)
    if bypass and run.reads_activations:
        wanted = run.methods.detector.resolve_score_pass(_reference_in_actor(run))
        if wanted == "policy":
            fix = "bypass mode skips the log-prob pass that the detector reads; set false, or score_pass=ablated"
            raise UserError("algorithm.rollout_correction.bypass_mode", True, fix)


def correction(run: Run) -> None:
    """verl's rollout correction compares old log-probs with the rollout's; other gates than the rollout's are no error.

    A row that trains with the quarantine closed was sampled with it open: importance weights would weigh, and
    rejection would drop, exactly the rows that are kept clean.
    """
    if not run.routed or not run.methods.intervention.uses_routes:
        return
    from verl_grad_routing.routing import Route

    tables = [run.methods.intervention.table_at(step) for step in (1, LATE)]
    closed = any((table.as_tensors()[0][[int(route) for route in Route]] != 1).any() for table in tables)
    for key in ("rollout_is", "rollout_rs"):
        value = run.get(f"algorithm.rollout_correction.{key}")
        if value and closed:
            fix = "it would weigh or drop rollouts for training without the quarantine they were sampled with; set null"
            raise UserError(f"algorithm.rollout_correction.{key}", value, fix)


def pairs(run: Run) -> None:
    detector = run.methods.detector
    if getattr(detector, "needs_pairs", False) and run.routed:
        load_pairs(detector.config.pairs)
    if getattr(run.methods.gate, "needs_pair_means", False) and not getattr(detector, "needs_pairs", False):
        fix = "this gate needs a detector with contrastive pairs"
        raise UserError("grad_routing.gate.name", run.settings.gate["name"], fix)


def unit_weights(run: Run) -> None:
    """Weights of units act on the activation gradients of the run's own method; methods in shadow have none of them."""
    weights = run.settings.blocks.units.weights
    if weights and not run.methods.intervention.table_at(LATE).weighs_activations:
        fix = "no route of this intervention weighs activation gradients, so units have nothing to be taken out of"
        raise UserError("grad_routing.blocks.units.weights", weights[0], fix)


def rescoring(run: Run) -> None:
    """A history is scored again where a direction changes, from what the workers hand over."""
    if not run.routed:
        return
    key, compared = "grad_routing.gate.rescore", build_shadows(run.settings)
    if run.methods.gate.rescores:
        _history_is_rescored(run, run.methods, key)
    for shadow in compared:
        with told_of(shadow.name):
            if shadow.methods.gate.rescores:
                _history_is_rescored(run, shadow.methods, key)


def _history_is_rescored(run: Run, methods: Methods, key: str) -> None:
    detector, gate = methods.detector, methods.gate
    if not detector.needs_directions:
        fix = f"{detector.name} projects on no direction that could change; set false"
        raise UserError(key, True, fix)
    where = detector.resolve_score_pass(_reference_in_actor(run))
    if where == "reference" or not detector.config.refresh_every:
        why = f"score_pass={where}" if where == "reference" else "refresh_every=0"
        fix = f"the direction never changes (detector.{why}), so scores stay what they are; set false, or refresh it"
        raise UserError(key, True, fix)
    while hasattr(gate, "inner"):
        gate = gate.inner
    rollouts = run.get("data.train_batch_size") * run.get("actor_rollout_ref.rollout.n", 1)
    if gate.config.window <= rollouts:
        fix = f"a step alone has {rollouts} rollouts, so no earlier one is remembered; give more, or rescore=false"
        raise UserError("grad_routing.gate.window", gate.config.window, fix)


def _reference_in_actor(run: Run) -> bool:
    """Whether the actor makes a reference pass for a KL term: with adapters, which that pass switches off."""
    kl = run.get("actor_rollout_ref.actor.use_kl_loss") or run.get("algorithm.use_kl_in_reward")
    return bool(kl) and run.get("actor_rollout_ref.model.lora_rank", 0) > 0


def groups(run: Run) -> None:
    samples = run.get("actor_rollout_ref.rollout.n", 1)
    if run.routed and run.methods.intervention.needs_groups and samples < 2:
        fix = f"{run.settings.intervention['name']} compares the rollouts of a prompt; set at least 2"
        raise UserError("actor_rollout_ref.rollout.n", samples, fix)


def fingerprints(run: Run) -> None:
    """What the pass that takes gradient fingerprints cannot do, and a batch too small to be judged in any step."""
    if not run.reads_fingerprints:
        return
    sequence = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    for key, plain in ((sequence, 1), ("actor_rollout_ref.model.enable_activation_offload", False)):
        value = run.get(key, plain)
        if value != plain:
            raise UserError(key, value, f"set {str(plain).lower()}: gradient fingerprints need it")
    needed = getattr(run.methods.detector.config, "min_positives", 0)
    rollouts = run.get("data.train_batch_size") * run.get("actor_rollout_ref.rollout.n", 1)
    if rollouts < needed:
        fix = f"a step has {rollouts} rollouts, so the detector would always abstain; give at most that"
        raise UserError("grad_routing.detector.min_positives", needed, fix)


def schedules(run: Run) -> None:
    """A head start in which the gate flags nothing is none."""
    head_start = getattr(run.methods.intervention.config, "head_start_steps", 0)
    warmup = getattr(run.methods.gate.config, "warmup_steps", 0)
    if 0 < head_start <= warmup:
        fix = f"give more steps than the gate's warm-up, in which nothing is flagged (gate.warmup_steps={warmup})"
        raise UserError("grad_routing.intervention.head_start_steps", head_start, fix)
    until = getattr(run.methods.intervention.config, "head_start_until", None)
    if until is None or run.methods.intervention.config.head_start_measure != "swapped_reward":
        return
    if not run.settings.validate_swapped:
        fix = "head_start_measure=swapped_reward reads the validation of the quarantine alone; set true"
        raise UserError("grad_routing.validate_swapped", False, fix)
    every = run.get("trainer.test_freq", -1)
    if not 0 < every < head_start:
        fix = f"head_start_measure=swapped_reward needs a validation within the {head_start} steps of the head start"
        raise UserError("trainer.test_freq", every, fix)


def hooks(run: Run) -> None:
    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS

    model = str(run.get("actor_rollout_ref.model.path"))
    for settings in run.settings.blocks.hooks:
        ENGINE_HOOKS.build(settings, "grad_routing.blocks.hooks").check(model)


def layers(run: Run) -> None:
    if not (run.reads_activations or run.reads_fingerprints):
        return
    count = run.shape_number("num_hidden_layers")
    if count is not None:
        run.methods.detector.resolve_layers(count)
