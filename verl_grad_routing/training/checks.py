"""Everything about a configuration that can be known to fail before Ray starts, each as one line.

The configuration is verl's whole tree as a plain mapping. Checks are small functions in ``CHECKS``; each raises
``UserError`` and knows one rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.config import GradRoutingConfig, Methods, build_methods, parse
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.doctor import require
from verl_grad_routing.doctor.machine import ray_check, shm_check
from verl_grad_routing.doctor.versions import version_checks
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

MISSING = "???"


def get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key, or ``default``."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


class Run:
    """A configuration with what has been parsed of it."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.settings: GradRoutingConfig = parse(get(config, "grad_routing", {}))
        self.methods: Methods = build_methods(self.settings)

    def get(self, key: str, default: Any = None) -> Any:
        return get(self.config, key, default)

    @property
    def routed(self) -> bool:
        return self.settings.blocks.enabled

    @property
    def reads_activations(self) -> bool:
        return self.routed and self.methods.detector.needs_directions

    @property
    def reads_fingerprints(self) -> bool:
        return self.routed and self.methods.detector.needs_fingerprints


def mandatory_values(run: Run) -> None:
    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{path}.{index}")
        elif node == MISSING:
            raise UserError(path, MISSING, "this value is required; set it on the command line or in your YAML")

    walk(get(run.config, "grad_routing"), "grad_routing")


def trainer_mode(run: Run) -> None:
    mode = run.get("trainer.v1.trainer_mode")
    if mode != "grad_routing":
        fix = "presets need trainer.v1.trainer_mode=grad_routing (verl's synchronous mode with routing)"
        raise UserError("trainer.v1.trainer_mode", mode, fix)
    if not run.get("trainer.use_v1", True):
        raise UserError("trainer.use_v1", False, "routing lives in verl's v1 trainer; set trainer.use_v1=true")


def registrations(run: Run) -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.workers.engine.base import EngineRegistry

    strategy = run.get("actor_rollout_ref.actor.strategy")
    fix = "the plugin is not loaded in this process; check `vgr doctor` and unset VERL_USE_EXTERNAL_PLUGINS"
    if "grad_routing" not in trainer_base.TRAINER_REGISTRY:
        raise UserError("trainer.v1.trainer_mode", "grad_routing", fix)
    import verl.workers.engine  # noqa: F401  (registers verl's engines, and then ours)

    engines = EngineRegistry._engines["language_model"]
    if strategy not in engines:
        raise UserError("actor_rollout_ref.actor.strategy", strategy, nearest(str(strategy), list(engines)))


def strategies(run: Run) -> None:
    wanted = "routed_fsdp2" if run.routed else "fsdp2"
    for key in ("actor_rollout_ref.actor.strategy", "actor_rollout_ref.ref.strategy"):
        strategy = run.get(key)
        right = wanted if key.endswith("actor.strategy") else "fsdp2"
        if strategy in ("fsdp", "megatron", "veomni", "torchtitan", None) or (run.routed and strategy != right):
            raise UserError(key, strategy, f"set {right}: routing needs FSDP2")


def ranks(run: Run) -> None:
    from verl_grad_routing.routing import check_ranks, check_total_rank

    if not run.routed:
        return
    blocks = run.settings.blocks
    check_ranks(blocks.deployed_rank, blocks.quarantine_rank)
    total = run.get("actor_rollout_ref.model.lora_rank")
    if total != blocks.total_rank:
        fix = f"must be the sum of both blocks' ranks, {blocks.total_rank}; leave it to the preset"
        raise UserError("actor_rollout_ref.model.lora_rank", total, fix)
    check_total_rank(blocks.total_rank)


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
    if rollout != "vllm":
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


def passes(run: Run) -> None:
    bypass = run.get("algorithm.rollout_correction.bypass_mode", False)
    if bypass and run.reads_activations:
        kl = run.get("actor_rollout_ref.actor.use_kl_loss") or run.get("algorithm.use_kl_in_reward")
        wanted = run.methods.detector.resolve_score_pass(bool(kl))
        if wanted == "policy":
            fix = "bypass mode skips the log-prob pass that the detector reads; set false, or score_pass=ablated"
            raise UserError("algorithm.rollout_correction.bypass_mode", True, fix)


def pairs(run: Run) -> None:
    detector = run.methods.detector
    if getattr(detector, "needs_pairs", False) and run.routed:
        load_pairs(detector.config.pairs)
    if getattr(run.methods.gate, "needs_pair_means", False) and not getattr(detector, "needs_pairs", False):
        fix = "this gate needs a detector with contrastive pairs"
        raise UserError("grad_routing.gate.name", run.settings.gate["name"], fix)


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


def hooks(run: Run) -> None:
    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS

    model = str(run.get("actor_rollout_ref.model.path"))
    for settings in run.settings.blocks.hooks:
        ENGINE_HOOKS.build(settings, "grad_routing.blocks.hooks").check(model)


def layers(run: Run) -> None:
    path = Path(str(run.get("actor_rollout_ref.model.path"))).expanduser() / "config.json"
    if not ((run.reads_activations or run.reads_fingerprints) and path.is_file()):
        return
    shape = json.loads(path.read_text())
    count = shape.get("num_hidden_layers", get(shape, "text_config.num_hidden_layers"))
    if count is not None:
        run.methods.detector.resolve_layers(count)


def files(run: Run) -> None:
    environment = run.settings.environment
    hint = f"; run: vgr prepare {environment.name} --to {environment.dir}" if environment.name else ""
    model = run.get("actor_rollout_ref.model.path")
    if model is None:
        raise UserError("actor_rollout_ref.model.path", None, "give the model's folder")
    if str(model).startswith(("/", ".", "~")) and not Path(str(model)).expanduser().is_dir():
        raise UserError("actor_rollout_ref.model.path", model, f"no such folder{hint}")
    for key in ("data.train_files", "data.val_files"):
        value = run.get(key)
        for name in value if isinstance(value, list) else [value]:
            if not str(name).startswith("hdfs:") and not Path(str(name)).expanduser().exists():
                raise UserError(key, name, f"no such file{hint}")


def replay(run: Run) -> None:
    folder = run.settings.replay_dir
    if folder is not None and not Path(folder).is_dir():
        raise UserError("grad_routing.replay_dir", folder, "no such folder; record one with grad_routing.record_dir")


def versions(run: Run) -> None:
    require(version_checks())


def machine(run: Run) -> None:
    """Shared memory, and the resources of a Ray cluster that the run would join."""
    ranks_per_node = float(run.get("trainer.n_gpus_per_node", 1))
    gpus = ranks_per_node * float(run.get("trainer.nnodes", 1))
    checks = [shm_check()]
    if run.get("ray_kwargs.ray_init.address") != "local":
        checks.append(ray_check(gpus=gpus))
    require(checks)


CHECKS: tuple[Callable[[Run], None], ...] = (
    mandatory_values,
    trainer_mode,
    strategies,
    ranks,
    adapter,
    merge,
    passes,
    files,
    pairs,
    groups,
    fingerprints,
    schedules,
    hooks,
    layers,
    replay,
    versions,
    machine,
    registrations,
)


def check(config: Mapping[str, Any]) -> None:
    """Run every check on verl's configuration as a plain mapping. Raises ``UserError``."""
    if MISSING in (get(config, "grad_routing.detector.pairs"),):
        raise UserError(
            "grad_routing.detector.pairs", MISSING, "give path.jsonl[@tag,tag] or path.md#section[@tag,tag]"
        )
    run = Run(config)
    for one in CHECKS:
        one(run)
