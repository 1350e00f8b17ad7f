"""What sampling a share of the rollouts with the quarantine off asks of the rest of the configuration."""

from __future__ import annotations

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run
from verl_grad_routing.training.quarantine_off import part_size


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
        ("algorithm.filter_groups.enable", "prompts that replace filtered groups would all be sampled without it"),
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
