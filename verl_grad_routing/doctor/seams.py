"""Where this package reaches into verl: every method that it overrides or calls, with the parameters it counts on.

verl says of its engine interface that it is subject to change, so each seam is written down here, checked by
``vgr doctor`` on the user's machine and by ``tests/compat`` in ours. The check reads verl's source and imports nothing,
which takes a fraction of a second where importing verl takes many.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from verl_grad_routing.doctor.checks import Check, Status


@dataclass(frozen=True)
class Seam:
    """One attribute of another package.

    Attributes:
        module: Where it is defined.
        name: ``function``, ``Class.method`` or ``Class.attribute``.
        parameters: Parameter names in order, ``*args`` and ``**kwargs`` with their stars; ``None`` for plain data.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# name: parameters, or None for an attribute that is no function
_TABLE: dict[str, dict[str, str | None]] = {
    "verl.trainer.ppo.v1.trainer_base": {
        "PPOTrainer.__init__": "self config",
        "PPOTrainer.init": "self",
        "PPOTrainer.fit": "self agent_loop_manager",
        "PPOTrainer._build_replay_buffer": "self",
        "PPOTrainer._init_resource_pool_mgr": "self",
        "PPOTrainer._submit_batch_to_rollout": "self batch",
        "PPOTrainer._step_once": "self metrics timing_raw sample_batch_size",
        "PPOTrainer._balance_batch": "self batch metrics logging_prefix keep_minibatch",
        "PPOTrainer._compute_old_log_prob": "self batch metrics",
        "PPOTrainer._compute_ref_log_prob": "self batch metrics",
        "PPOTrainer._compute_advantage": "self batch metrics",
        "PPOTrainer._update_actor": "self batch metrics",
        "PPOTrainer._compute_metrics": "self batch metrics timing_raw global_steps epoch",
        "PPOTrainer.get_llm_client": "self",
        "PPOTrainer._validate": "self",
        "PPOTrainer._save_checkpoint": "self",
        "PPOTrainer._load_checkpoint": "self",
        "TRAINER_REGISTRY": None,
        "register_trainer": "name",
        "get_trainer_cls": "name",
    },
    "verl.trainer.ppo.v1.trainer_sync": {
        "PPOTrainerSync.on_init_end": "self",
        "PPOTrainerSync.on_sample_end": "self",
        "PPOTrainerSync.on_step_end": "self",
    },
    "verl.trainer.ppo.v1.replay_buffer": {
        "ReplayBuffer.sample": "self global_steps partition_id batch_size",
        "ReplayBuffer._wait_for_next_poll": "self partition_id last_debug_time",
        "ReplayBuffer._sync_metadata_from_transfer_queue": "self",
    },
    "verl.experimental.agent_loop.agent_loop": {
        "register": "agent_name",
    },
    "verl.experimental.agent_loop.single_turn_agent_loop": {
        "SingleTurnAgentLoop.run": "self sampling_params priority **kwargs",
    },
    "verl.workers.rollout.base": {
        "_ROLLOUT_REGISTRY": None,
    },
    "verl.workers.rollout.replica": {
        "RolloutReplicaRegistry.register": "cls name loader",
        "TokenOutput": None,
    },
    "verl.workers.rollout.vllm_rollout.vllm_async_server": {
        "vLLMHttpServer.run_server": "self args",
        "vLLMHttpServer.run_headless": "self args",
        "vLLMHttpServer._get_worker_extension_cls": "self",
        "vLLMHttpServer.generate": (
            "self prompt_ids sampling_params request_id image_data video_data audio_data mm_processor_kwargs priority "
            "kv_transfer_params"
        ),
        "vLLMReplica._get_server_name_prefix": "self",
    },
    "verl.workers.rollout.vllm_rollout.vllm_rollout": {
        "ServerAdapter._get_server_name_prefix": "self",
    },
    "verl.workers.rollout.vllm_rollout.utils": {
        "vLLMColocateWorkerExtension._update_weights": "self weights peft_config base_sync_done",
        "VLLM_LORA_INT_ID": None,
        "VLLM_LORA_PATH": None,
    },
    "verl.utils.vllm.utils": {
        "TensorLoRARequest": None,
    },
    "verl.workers.rollout.llm_server": {
        "LLMServerManager.get_addresses": "self",
        "LLMServerClient.generate": (
            "self request_id prompt_ids sampling_params image_data video_data audio_data mm_processor_kwargs **kwargs"
        ),
    },
    "verl.trainer.ppo.padding_utils": {
        "upsample_batch_to_divisible_size": "batch batch_multiple eos_token_id",
    },
    "verl.workers.engine.base": {
        "BaseEngine.train_batch": "self data loss_function",
        "EngineRegistry.register": "cls model_type backend device vendor",
    },
    "verl.workers.engine.fsdp.transformer_impl": {
        "FSDPEngine._build_module": "self",
        "FSDPEngine._build_lora_module": "self module",
        "FSDPEngine._build_fsdp_module": "self module",
        "FSDPEngine._build_optimizer": "self module",
        "FSDPEngine.forward_backward_batch": "self data loss_function forward_only",
        "FSDPEngine.optimizer_step": "self",
        "FSDPEngine.optimizer_zero_grad": "self",
        "FSDPEngine.train_mode": "self **kwargs",
        "FSDPEngine.get_per_tensor_param": "self layered_summon base_sync_done **kwargs",
        "FSDPEngine.disable_adapter": "self",
        "FSDPEngine._get_packed_pad_size": "self packed_length",
        "FSDPEngine.save_checkpoint": "self local_path hdfs_path global_step max_ckpt_to_keep **kwargs",
        "FSDPEngine.load_checkpoint": "self local_path hdfs_path del_local_after_load **kwargs",
        "FSDPEngineWithLMHead.prepare_model_inputs": "self micro_batch",
        "FSDPEngineWithLMHead.prepare_model_outputs": "self output output_args micro_batch logits_processor_func",
        "FSDPEngineWithLMHead.forward_step": "self micro_batch loss_function forward_only",
    },
    "verl.workers.engine.utils": {
        "postprocess_batch_func": "output_lst indices data",
    },
    "verl.workers.engine_workers": {
        "ActorRolloutRefWorker.actor_worker_cls": None,
        "ActorRolloutRefWorker.init_model": "self",
        "ActorRolloutRefWorker.compute_log_prob": "self data",
        "ActorRolloutRefWorker.compute_ref_log_prob": "self data",
        "ActorRolloutRefWorker.update_actor": "self data",
        "ActorRolloutRefWorker.update_weights": "self global_steps mode",
        "TrainingWorker.train_batch": "self data",
        "TrainingWorker.train_mini_batch": "self data",
        "TrainingWorker.infer_batch": "self data",
    },
    "verl.plugin.platform.platform_manager": {
        "PlatformRegistry.register": "cls platform",
        "PlatformRegistry.registered_names": "cls",
        "get_platform": "",
    },
    "verl.utils.fsdp_utils": {
        "collect_lora_params": "module layered_summon base_sync_done",
        "fsdp2_clip_grad_norm_": "parameters max_norm norm_type error_if_nonfinite foreach",
    },
    "verl.utils.dataset.rl_dataset": {
        "RLHFDataset.__init__": "self data_files tokenizer config processor max_samples",
        "RLHFDataset.maybe_filter_out_long_prompts": "self dataframe",
        "get_dataset_class": "data_config",
    },
    "verl.trainer.sft_trainer": {
        "SFTTrainer.__init__": "self config",
        "SFTTrainer._build_dataloader": "self",
        "SFTTrainer.fit": "self",
        "create_sft_dataset": "data_paths data_config tokenizer processor max_samples",
    },
    "verl.utils.tensordict_utils": {
        "assign_non_tensor_data": "tensor_dict key val",
        "assign_non_tensor_stack": "tensor_dict key val",
        "index_select_tensor_dict": "batch indices",
        "list_of_dict_to_tensordict": "list_of_dicts",
        "maybe_fix_3d_position_ids": "data",
        "get_tensordict": "tensor_dict non_tensor_dict",
        "assign_non_tensor": "tensor_dict **kwargs",
    },
    "verl.utils.distributed": {
        "initialize_global_process_group_ray": "timeout_second backend",
        "destroy_global_process_group": "",
    },
    "verl.workers.config.optimizer": {
        "build_optimizer": "parameters config",
    },
    "verl.workers.utils.padding": {
        "response_from_nested": "tensor response_mask",
        "response_to_nested": "tensor response_mask",
    },
    "transfer_queue.interface": {
        "kv_batch_get": "keys partition_id select_fields",
        "kv_batch_put": "keys partition_id fields tags data_parser",
        "kv_clear": "keys partition_id",
    },
}

SEAMS: tuple[Seam, ...] = tuple(
    Seam(module, name, None if parameters is None else tuple(parameters.split()))
    for module, names in _TABLE.items()
    for name, parameters in names.items()
)


@cache
def _source_file(module: str) -> Path | None:
    """The file of ``module``, found without importing its package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for candidate in (Path(root, *rest).with_suffix(".py"), Path(root, *rest, "__init__.py")):
            if candidate.is_file():
                return candidate
    return None


@cache
def _definitions(file: Path) -> dict[str, tuple[str, ...] | None]:
    """Names that ``file`` defines at the top and one level into its classes -> parameters, ``None`` for no function."""
    found: dict[str, tuple[str, ...] | None] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[prefix + node.name] = _parameters(node.args)
            elif isinstance(node, ast.ClassDef):
                found[prefix + node.name] = None
                if not prefix:
                    collect(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update({prefix + t.id: None for t in node.targets if isinstance(t, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = None

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return tuple(names)


def seam_problem(seam: Seam) -> str | None:
    """What is wrong with ``seam`` in the installed packages, or ``None``."""
    file = _source_file(seam.module)
    if file is None:
        return "its module is missing"
    definitions = _definitions(file)
    if seam.name not in definitions:
        return "missing"
    found = definitions[seam.name]
    if found == seam.parameters:
        return None
    return f"parameters are {_written(found)}, expected {_written(seam.parameters)}"


def _written(parameters: tuple[str, ...] | None) -> str:
    return "none, it is no function" if parameters is None else f"({', '.join(parameters)})"


def seam_checks(seams: tuple[Seam, ...] = SEAMS) -> Iterator[Check]:
    """One failure per broken seam; one line for all of them when none is."""
    problems = {str(seam): problem for seam in seams if (problem := seam_problem(seam))}
    for name, problem in problems.items():
        yield Check(name, Status.FAIL, problem, "install a supported verl: pip install 'verl>=0.9.1,<0.10'")
    if not problems:
        yield Check("verl seams", Status.OK, f"{len(seams)} of {len(seams)} as expected")
