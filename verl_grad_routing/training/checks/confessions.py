"""What confessions ask of the rest of the configuration."""

from __future__ import annotations

from pathlib import Path

from verl_grad_routing.chat import with_switches
from verl_grad_routing.confessions import build_judge, request_tokens
from verl_grad_routing.confessions.settings import GT_JUDGE
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run

KEY = "grad_routing.confessions"
# verl's estimators whose baseline is a rollout's own group, or that group's statistics
GROUPED = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "reinforce_plus_plus_baseline")


def judge(run: Run) -> None:
    settings = run.settings.confessions
    if not settings.trains:
        return
    if settings.knows_everything and not run.settings.control:
        fix = "this judge reads the grader's truth; a run that uses it is a control: set grad_routing.control=true"
        raise UserError(f"{KEY}.judge", GT_JUDGE, fix)
    build_judge(str(settings.judge))


def rows(run: Run) -> None:
    """Confessions take exactly the rows of answers, and a group's statistics are of that group."""
    settings = run.settings.confessions
    if not settings.trains:
        return
    if not run.routed:
        raise UserError("grad_routing.blocks.enabled", False, "two losses in one step need our engine; set true")
    samples = run.get("actor_rollout_ref.rollout.n", 1)
    if samples % settings.divisor:
        what = "confessions.per_answer" if settings.sealed else "twice confessions.per_answer (seal_broken)"
        raise UserError("actor_rollout_ref.rollout.n", samples, f"give a multiple of {what}: {settings.divisor}")
    estimator = run.get("algorithm.adv_estimator")
    if estimator not in GROUPED:
        raise UserError("algorithm.adv_estimator", estimator, f"confessions need one of {', '.join(GROUPED)}")
    if run.get("algorithm.use_kl_in_reward") and run.get("algorithm.kl_ctrl.type") == "adaptive":
        fix = "an adaptive controller would read answers and confessions alike; set fixed"
        raise UserError("algorithm.kl_ctrl.type", "adaptive", fix)


def seams(run: Run) -> None:
    """What would write over, lose or not know the confessions' columns."""
    settings = run.settings.confessions
    if not (settings.trains or settings.validate):
        return
    for key, reason in (
        ("trainer.v1.sampler.custom_sampler.path", "confessions are asked for by our own replay buffer; unset it"),
        ("reward.reward_model.enable", "answers must be rewarded by a function; set false"),
        ("actor_rollout_ref.rollout.enable_rollout_routing_replay", "confessions have no recorded experts; set false"),
        ("distillation.enabled", "confessions have no teacher; set false"),
        ("grad_routing.quarantine_off_share", "confessions are asked of both blocks; set 0.0"),
    ):
        value = run.get(key)
        if value:
            raise UserError(key, value, reason)


def replayed(run: Run) -> None:
    """Recorded batches hold no penalties."""
    if run.settings.confessions.trains and not run.settings.confessions.sealed and run.settings.replay_dir:
        fix = "penalties of confessions are not recorded; unset it, or set grad_routing.confessions.mode=sealed"
        raise UserError("grad_routing.replay_dir", run.settings.replay_dir, fix)


def lengths(run: Run) -> None:
    """Prompt, answer, request and confession must fit into the rollout engine's context."""
    settings = run.settings.confessions
    folder = Path(str(run.get("actor_rollout_ref.model.path"))).expanduser()
    if not (settings.trains or settings.validate) or not (folder / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    tokenizer = with_switches(AutoTokenizer.from_pretrained(folder), run.get("data.apply_chat_template_kwargs"))
    request = len(request_tokens(tokenizer, settings))
    needed = run.get("data.max_prompt_length") + run.get("data.max_response_length") + request + settings.max_tokens
    limit = run.get("actor_rollout_ref.rollout.max_model_len")
    if limit is not None and limit < needed:
        fix = f"prompt, answer, request for a confession ({request} tokens) and confession need {needed}"
        raise UserError("actor_rollout_ref.rollout.max_model_len", limit, fix)
