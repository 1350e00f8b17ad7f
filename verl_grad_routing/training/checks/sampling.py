"""What sampling a share of the rollouts with the quarantine off asks of the rest of the configuration."""

from __future__ import annotations

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run
from verl_grad_routing.training.quarantine_off import part_size
from verl_grad_routing.training.two_adapters import CHOOSING, ROLLOUT, SEEDED

VERLS_LOOPS = ("single_turn_agent", "tool_agent")


ROLLOUT_KEY, LOOP_KEY = "actor_rollout_ref.rollout.name", "actor_rollout_ref.rollout.agent.default_agent_loop"


def two_adapters(run: Run) -> None:
    """Two adapters in the rollout engine go together with requests that choose one, on blocks that are adapters."""
    settings, rollout, key = run.settings, run.get(ROLLOUT_KEY), "grad_routing.quarantine_off_by"
    by_request = settings.quarantine_off_by == "request"
    if by_request and not settings.quarantine_off_share:
        fix = "no rollout is sampled with the quarantine off (quarantine_off_share=0.0); set sync"
        raise UserError(key, "request", fix)
    if by_request != (rollout == ROLLOUT):
        fix = f"set {ROLLOUT}, as +grad_routing/rollout=two_adapters behind the preset does; or quarantine_off_by=sync"
        if not by_request:
            fix = "no request chooses its adapter (quarantine_off_by=sync); set vllm, or quarantine_off_by=request"
        raise UserError(ROLLOUT_KEY, rollout, fix)
    if not by_request:
        return
    if settings.blocks.kind != "adapters" or run.get("actor_rollout_ref.model.lora.merge", False):
        raise UserError(key, "request", "only adapters are chosen by request, not whole weights; set sync")
    parallel = run.get("actor_rollout_ref.rollout.pipeline_model_parallel_size", 1)
    if parallel != 1:
        raise UserError("actor_rollout_ref.rollout.pipeline_model_parallel_size", parallel, "verl's vLLM takes 1 only")
    loop = run.get(LOOP_KEY, "single_turn_agent")
    if loop in VERLS_LOOPS:
        fix = f"its requests name no adapter; set {CHOOSING}, {SEEDED}, or one of your own that is a ChosenAdapter"
        raise UserError(LOOP_KEY, loop, fix)


def filtered_groups(run: Run) -> None:
    """verl drops groups whose rewards are all the same in its replay buffer, before anything here sees them.

    They teach nothing, but detector and gate are to see every rollout: a group in which all hack is one of these.
    """
    key = "algorithm.filter_groups.enable"
    if run.routed and run.get(key):
        raise UserError(
            key, True, "verl would drop groups of one reward before detector, gate and metrics see them; set false"
        )


def quarantine_off(run: Run) -> None:
    """A whole number of prompts or rollouts, and nothing that submits prompts while the other policy is loaded."""
    share = run.settings.quarantine_off_share
    if not share:
        return
    if run.settings.quarantine_off_unit == "prompt":
        part_size(share, run.get("data.train_batch_size"), "prompts of a step")
    else:
        rollouts = run.get("actor_rollout_ref.rollout.n", 1)
        count = part_size(share, rollouts, "rollouts of a prompt")
        if run.settings.quarantine_off_advantages == "apart" and min(count, rollouts - count) < 2:
            fix = "a group of one rollout has nothing to be compared with; give each part two, or advantages together"
            raise UserError("grad_routing.quarantine_off_share", share, fix)
    for key, reason in (
        (
            "trainer.v1.sampler.sync_refill_failed_groups",
            "prompts that replace failed ones would be sampled without it",
        ),
        ("trainer.v1.sampler.custom_sampler.path", "the two parts of a step need this package's replay buffer"),
        ("skip.rollout_tq.enable", "a step's rollouts are submitted in two parts"),
    ):
        value = run.get(key)
        if value:
            raise UserError(key, value, f"{reason} (quarantine_off_share={share}); unset it, or give share 0")
