"""Two adapters in the rollout engine: who is asked, what is loaded, and what verl finds by name."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_grad_routing.training.quarantine_off import MARK
from verl_grad_routing.training.two_adapters import ADAPTER, DEPLOYED, DEPLOYED_ID, ROLLOUT

pytestmark = pytest.mark.timeout(180)

ROW = {"uid": "a", "session_id": 1}


def asked(uid: str, rollout: str = ROLLOUT, **given: Any) -> dict[str, Any]:
    from verl_grad_routing.training.two_adapters.request import ChosenAdapter

    class Loop:
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
            assert kwargs == {**ROW, "uid": uid}
            return sampling_params

    class Mine(ChosenAdapter, Loop):
        rollout_config = SimpleNamespace(name=rollout)

    before = {"temperature": 1.0, **given}
    found = asyncio.run(Mine().run(before, **{**ROW, "uid": uid}))
    assert before == {"temperature": 1.0, **given}  # shared by all rollouts of a batch
    return found


def test_rollouts_with_the_quarantine_off_ask_for_the_deployed_adapter() -> None:
    assert asked(f"a{MARK}") == {"temperature": 1.0, "extra_args": {ADAPTER: DEPLOYED}}
    assert asked(f"a{MARK}", extra_args={"mine": 1})["extra_args"] == {"mine": 1, ADAPTER: DEPLOYED}
    assert asked("a") == {"temperature": 1.0}
    assert asked(f"a{MARK}", rollout="vllm") == {"temperature": 1.0}


def test_the_seeded_loop_chooses_too() -> None:
    from verl_grad_routing.training.agent_loops import ChoosingSingleTurn, SeededSingleTurn
    from verl_grad_routing.training.request_seeds import SeededRequests
    from verl_grad_routing.training.two_adapters.request import ChosenAdapter

    assert issubclass(SeededSingleTurn, SeededRequests) and issubclass(SeededSingleTurn, ChosenAdapter)
    assert issubclass(ChoosingSingleTurn, ChosenAdapter) and not issubclass(ChoosingSingleTurn, SeededRequests)


def test_the_engine_puts_the_named_adapter_into_the_request() -> None:
    from vllm import SamplingParams

    from verl_grad_routing.training.two_adapters.server import ChoosingEngine

    seen: list[dict[str, Any]] = []
    engine = ChoosingEngine(SimpleNamespace(generate=lambda **request: seen.append(request), other=3))
    both = SimpleNamespace(lora_int_id=123)
    engine.generate(sampling_params=SamplingParams(), lora_request=both, prompt="p")
    engine.generate(sampling_params=SamplingParams(extra_args={ADAPTER: DEPLOYED}), lora_request=both, prompt="p")
    assert seen[0]["lora_request"] is both and seen[1]["lora_request"].lora_int_id == DEPLOYED_ID
    assert [request["prompt"] for request in seen] == ["p", "p"] and engine.other == 3
    with pytest.raises(RuntimeError, match="before the first weight sync"):
        engine.generate(sampling_params=SamplingParams(extra_args={ADAPTER: DEPLOYED}), lora_request=None)


def test_the_deployed_adapter_is_the_synced_one_without_the_quarantines_columns() -> None:
    from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID

    from verl_grad_routing.training.two_adapters.extension import deployed_part

    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 7, generator=draw), torch.randn(6, 5, generator=draw)
    tensors = {"m.q_proj.lora_A.weight": A, "m.q_proj.lora_B.weight": B}
    part, x = deployed_part(tensors, 3), torch.randn(7, generator=draw)
    here = part["m.q_proj.lora_B.weight"] @ (part["m.q_proj.lora_A.weight"] @ x)
    assert torch.allclose(here, B[:, :3] @ (A[:3] @ x), atol=1e-6)
    assert B.all()  # what verl loads is left alone
    assert torch.equal(deployed_part(tensors, 5)["m.q_proj.lora_B.weight"], B)
    assert not deployed_part(tensors, 0)["m.q_proj.lora_B.weight"].any()
    assert DEPLOYED_ID != VLLM_LORA_INT_ID


def test_a_worker_adds_it_after_verls_and_replaces_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from verl_grad_routing.training.two_adapters import DEPLOYED_ROWS
    from verl_grad_routing.training.two_adapters.extension import TwoAdapterExtension

    done: list[tuple[str, int]] = []

    class Worker(TwoAdapterExtension):
        def __new__(cls) -> Any:
            return object.__new__(cls)

        def remove_lora(self, number: int) -> None:
            done.append(("remove", number))

        def add_lora(self, request: Any) -> None:
            done.append(("add", request.lora_int_id))
            if request.lora_int_id == DEPLOYED_ID:
                assert not request.lora_tensors["m.lora_B.weight"][:, 1:].any()

    weights = [("m.lora_A.weight", torch.ones(2, 3)), ("m.lora_B.weight", torch.ones(3, 2))]
    Worker()._update_weights(weights, {"r": 2, DEPLOYED_ROWS: 1}, True)
    assert done == [("add", 123), ("remove", DEPLOYED_ID), ("add", DEPLOYED_ID)]
    monkeypatch.setattr(vLLMColocateWorkerExtension, "_update_weights", lambda *_, **__: done.append(("base", 0)))
    Worker()._update_weights(weights, {"r": 2}, False)
    assert done[3:] == [("base", 0)]  # base weights bring no adapter


def test_verl_finds_it_by_name_in_a_process_that_imports_nothing_of_ours() -> None:
    code = f"""
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
ours, verls = get_rollout_replica_class("{ROLLOUT}"), get_rollout_replica_class("vllm")
print(ours.__name__, issubclass(ours, verls), verls.__module__, get_rollout_class("{ROLLOUT}").__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert done.stdout.split("\n")[-2].split() == [
        "TwoAdapterReplica",
        "True",
        "verl.workers.rollout.vllm_rollout.vllm_async_server",
        "verl.workers.rollout.vllm_rollout.vllm_rollout",
    ]
