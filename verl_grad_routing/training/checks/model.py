"""What the blocks ask of engine, adapter and rollout."""

from __future__ import annotations

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest
from verl_grad_routing.training.checks.run import Run
from verl_grad_routing.training.two_adapters import ROLLOUT


def strategies(run: Run) -> None:
    wanted = "routed_fsdp2" if run.routed else "fsdp2"
    for key in ("actor_rollout_ref.actor.strategy", "actor_rollout_ref.ref.strategy"):
        strategy = run.get(key)
        right = wanted if key.endswith("actor.strategy") else "fsdp2"
        if strategy in ("fsdp", "megatron", "veomni", "torchtitan", None) or (run.routed and strategy != right):
            raise UserError(key, strategy, f"set {right}: routing needs FSDP2")


def kind(run: Run) -> None:
    """What the blocks' own kind refuses."""
    from verl_grad_routing.training.block_kinds import BLOCK_KINDS

    if not run.routed:
        return
    name = run.settings.blocks.kind
    if name not in BLOCK_KINDS:
        raise UserError("grad_routing.blocks.kind", name, nearest(str(name), list(BLOCK_KINDS)))
    BLOCK_KINDS[name].check(run)


def adapter(run: Run) -> None:
    if not run.routed:
        return
    for key, reason in (
        ("actor_rollout_ref.model.lora_adapter_path", "blocks start from their own initialisation; unset it"),
        ("actor_rollout_ref.model.target_parameters", "blocks are put on linear layers; unset it"),
        ("actor_rollout_ref.model.use_fused_kernels", "fused kernels bypass the routed layers; set false"),
        ("actor_rollout_ref.model.tiled_mlp.enabled", "the tiled MLP bypasses the routed layers; set false"),
        ("actor_rollout_ref.actor.use_prefix_grouper", "prefix groups share tokens between rollouts; set false"),
        ("actor_rollout_ref.model.lora.fully_sharded_loras", "the joined adapter is sent whole; set false"),
        ("actor_rollout_ref.actor.fsdp_config.qat.enable", "quantisation-aware training of blocks is unsupported"),
    ):
        value = run.get(key)
        if value:
            raise UserError(key, value, reason)
    rank = run.get("actor_rollout_ref.model.lora.rank", 0)
    if rank:
        raise UserError("actor_rollout_ref.model.lora.rank", rank, "leave 0: the blocks' ranks decide")
    backend = run.get("actor_rollout_ref.rollout.checkpoint_engine.backend")
    if backend not in (None, "naive"):
        raise UserError("actor_rollout_ref.rollout.checkpoint_engine.backend", backend, "routing needs naive")
    rollout = run.get("actor_rollout_ref.rollout.name")
    if rollout not in ("vllm", ROLLOUT):
        raise UserError("actor_rollout_ref.rollout.name", rollout, "routed adapters are sent to vllm only")


def merge(run: Run) -> None:
    if not run.get("actor_rollout_ref.model.lora.merge", False):
        return
    dtype = run.get("actor_rollout_ref.rollout.dtype")
    if run.routed and run.get("actor_rollout_ref.rollout.layered_summon"):
        raise UserError("actor_rollout_ref.rollout.layered_summon", True, "set false with model.lora.merge=true")
    if run.routed and dtype not in ("bfloat16", "auto"):
        fix = "verl sends merged weights as bfloat16; set actor_rollout_ref.rollout.dtype=bfloat16 or lora.merge=false"
        raise UserError("actor_rollout_ref.model.lora.merge", True, fix)
