"""What the two blocks start from."""

from __future__ import annotations

from pathlib import Path

from verl_grad_routing.chat import described
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run

# verl's losses that do not average as loss_agg_mode says
OWN_AGGREGATION = {"sapo": "seq-mean-token-mean", "geo_mean": "loss_mode=geo_mean"}


def basis(run: Run) -> None:
    """A known initialisation; a contrast if and only if it reads one, made on the model that is trained."""
    if not run.routed:
        return
    from verl_grad_routing.routing import check_contrast, load_contrast
    from verl_grad_routing.subspaces.basis import model_hash

    blocks = run.settings.blocks
    try:
        check_contrast(blocks.init, blocks.contrast is not None)
    except UserError as error:
        key = "grad_routing.blocks.init" if error.key == "init" else error.key
        raise UserError(key, error.value, error.fix) from None
    if blocks.contrast is None:
        return
    origin, model = load_contrast(blocks.contrast).origin, Path(str(run.get("actor_rollout_ref.model.path")))
    made_on, folder = origin.get("model_hash", ""), model.expanduser()
    switches = described(run.get("data.apply_chat_template_kwargs")).get("chat")
    if origin.get("chat") != switches:
        fix = f"made with the chat template's switches {origin.get('chat')}, the run has {switches}; see vgr contrast"
        raise UserError("grad_routing.blocks.contrast", blocks.contrast, fix)
    if made_on and folder.is_dir() and made_on != model_hash(folder):
        fix = f"made on another model ({origin.get('model')}) than {model}; run `vgr contrast` on this one"
        raise UserError("grad_routing.blocks.contrast", blocks.contrast, fix)


def form(run: Run) -> None:
    """Hooks that read A and B as they are need them to be the parameters."""
    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS

    name = run.settings.blocks.form
    for settings in run.settings.blocks.hooks:
        hook = ENGINE_HOOKS.get(settings.get("name"))  # type: ignore[arg-type]
        if run.routed and name != "lora" and hook is not None and hook.plain_lora:
            fix = f"the hook {settings['name']} counts on A and B as the trained parameters; set lora, or drop the hook"
            raise UserError("grad_routing.blocks.form", name, fix)


def precision(run: Run) -> None:
    """Blocks have the dtype of the model's own weights, where an ordinary step is lost in half precision."""
    key = "actor_rollout_ref.actor.fsdp_config.model_dtype"
    dtype = str(run.get(key) or "fp32")
    if run.routed and dtype not in ("fp32", "float32", "32"):
        fix = (
            "the blocks and their optimizer would be kept in it; set fp32, mixed_precision computes in bfloat16 anyway"
        )
        raise UserError(key, dtype, fix)


def optimisation(run: Run) -> None:
    """A block's own betas need an optimizer that has some, and a mean over a block's own part what the loss counts."""
    optim, optimizer = run.settings.blocks.optim, run.get("actor_rollout_ref.actor.optim.optimizer", "AdamW")
    betas = (optim.betas_deployed, optim.betas_quarantine, optim.betas_shared)
    if run.routed and any(own is not None for own in betas):
        from verl_grad_routing.training.block_optim import check_betas

        check_betas(str(optimizer))
    if run.routed and optim.mean_over != "batch" and run.settings.confessions.trains:
        fix = "answers and confessions are averaged apart, so there is no one mean over a block's own part; set batch"
        raise UserError("grad_routing.blocks.optim.mean_over", optim.mean_over, fix)
    loss = str(run.get("actor_rollout_ref.actor.loss_agg_mode", "token-mean"))
    mode = str(run.get("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla"))
    loss = OWN_AGGREGATION.get(mode, loss)
    fits = {"own_tokens": loss == "token-mean", "own_rollouts": loss.startswith("seq-mean")}
    if run.routed and not fits.get(optim.mean_over, True):
        fix = f"{loss} counts otherwise; own_tokens goes with token-mean, own_rollouts with seq-mean-*"
        raise UserError("grad_routing.blocks.optim.mean_over", optim.mean_over, fix)
