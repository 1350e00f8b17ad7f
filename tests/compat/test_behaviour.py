"""Behaviour of verl that this package is built on and that no signature shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(300)


def test_a_plugin_is_imported_never_called_and_its_errors_are_hidden(tmp_path: Path) -> None:
    """Hence plugin.py registers by import and warns by itself."""
    (tmp_path / "quiet_plugin.py").write_text("print('imported')\ndef register():\n    print('called')\n")
    (tmp_path / "broken_plugin.py").write_text("print('breaking')\nraise RuntimeError('lost')\n")
    info = tmp_path / "probe_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\na = broken_plugin\nb = quiet_plugin:register\n")
    done = subprocess.run(
        [sys.executable, "-c", "import verl"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "breaking" in done.stdout and "imported" in done.stdout
    assert "called" not in done.stdout
    assert "lost" not in done.stderr


def test_a_trainer_name_is_taken_once() -> None:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, get_trainer_cls, register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class Other(PPOTrainerSync):
        pass

    assert TRAINER_REGISTRY["sync"] is PPOTrainerSync
    with pytest.raises(ValueError, match="already registered"):
        register_trainer("sync")(Other)
    with pytest.raises(ValueError, match="Unknown trainer"):
        get_trainer_cls("no_such_trainer")


def test_any_mode_but_sync_gets_the_asynchronous_replay_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hence our trainer answers "sync" when verl asks for its mode."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    picked = []
    for name in ("ReplayBuffer", "ReplayBufferAsync"):
        monkeypatch.setattr(trainer_base, name, lambda _name=name, **_: picked.append(_name))
    sampler = {"max_off_policy_threshold": 1, "max_off_policy_strategy": "drop", "sampler_kwargs": {}}
    settings = {"trainer": {"v1": {"sampler": sampler}}, "data": {"train_batch_size": 4}, "algorithm": {}}
    trainer = PPOTrainerSync.__new__(PPOTrainerSync)
    trainer.config = OmegaConf.create(settings)
    for mode in ("sync", "grad_routing"):
        trainer.trainer_mode = mode
        trainer._build_replay_buffer()
    assert picked == ["ReplayBuffer", "ReplayBufferAsync"]


def test_the_actor_hands_its_strategy_to_the_engine() -> None:
    """Hence actor.strategy=routed_fsdp2 passes, although the engine's own field would refuse it."""
    from verl.workers.config.actor import FSDPActorConfig
    from verl.workers.config.engine import FSDPEngineConfig

    with pytest.raises(AssertionError, match="not supported"):
        FSDPEngineConfig(strategy="routed_fsdp2")
    engine = FSDPEngineConfig(strategy="fsdp2")
    FSDPActorConfig(strategy="routed_fsdp2", fsdp_config=engine, ppo_micro_batch_size_per_gpu=1, rollout_n=1)
    assert engine.strategy == "routed_fsdp2"


def test_an_engine_is_found_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import BaseEngine, EngineRegistry

    class Engine(BaseEngine):
        pass

    monkeypatch.setattr(EngineRegistry, "_engines", {})
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cpu")
    EngineRegistry.register("language_model", "probe", device=["cpu", "cuda"])(Engine)
    assert EngineRegistry.get_engine_cls("language_model", "probe") is Engine
    with pytest.raises(AssertionError, match="Unknown backend"):
        EngineRegistry.get_engine_cls("language_model", "no_such_strategy")


def test_an_extra_output_comes_back_in_the_order_of_the_rows() -> None:
    """A number per rollout leaves the engine as [b, 1]; micro-batches that were reordered are put back."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.utils import postprocess_batch_func

    rows = tu.get_tensordict({"x": torch.arange(4.0)})
    tu.assign_non_tensor(rows, use_dynamic_bsz=True)
    order = [[2, 0], [3, 1]]  # rows of each micro-batch
    outputs = [{"model_output": {"score": torch.tensor(part, dtype=torch.float)[:, None]}} for part in order]
    result = postprocess_batch_func(outputs, order, rows)["model_output"]["score"]
    assert [row.tolist() for row in result.unbind()] == [[0.0], [1.0], [2.0], [3.0]]


def test_our_platform_adds_no_method_of_its_own() -> None:
    """A method that verl renames would otherwise stay behind unnoticed."""
    from verl.plugin.platform.platform_base import PlatformBase

    from verl_grad_routing.training.platform_cpu import PlatformCPU

    public = {name for name in vars(PlatformCPU) if not name.startswith("_")}
    assert public <= set(dir(PlatformBase))
    assert not getattr(PlatformCPU, "__abstractmethods__", None)


def test_the_queue_is_one_per_ray() -> None:
    """Hence training/shared_queue.py, and a Ray of its own for every run of a comparison (compare/own_ray.py)."""
    import ray
    import transfer_queue.interface as interface
    from ray.actor import ActorHandle

    from verl_grad_routing.training.shared_queue import NAME, NAMESPACE

    source = Path(interface.__file__).read_text()
    assert f'ray.get_actor("{NAME}", namespace="{NAMESPACE}")' in source
    assert isinstance(ActorHandle._actor_id, property)
    actor = ray.ActorID.from_random()  # its last four bytes are the job's
    assert actor.job_id.hex() == actor.hex()[-8:]


def test_the_socket_for_weights_is_named_after_the_ray_job() -> None:
    """Hence the number of a job in compare/own_ray.py, and the locks of compare/job_numbers.py beside the socket."""
    import verl.workers.rollout.vllm_rollout.vllm_rollout as rollout

    source = Path(rollout.__file__).read_text()
    assert "job_id = ray.get_runtime_context().get_job_id()" in source
    assert "ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{self.replica_rank}-rank-{local_rank}.sock" in source


def test_flash_attention_2_is_the_default() -> None:
    """Hence the check in doctor/machine.py."""
    import verl.workers.config.model as model

    source = Path(model.__file__).read_text()
    assert 'self.override_config.get("attn_implementation", "flash_attention_2")' in source
