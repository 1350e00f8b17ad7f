"""A run refuses the TransferQueue of another run on the same Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.shared_queue import refuse_another_runs_queue

OWN, OTHER = ray.JobID.from_int(3), ray.JobID.from_int(2)


def queue_of(job: ray.JobID | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> SimpleNamespace:
        assert (name, namespace) == ("TransferQueueController", "transfer_queue")
        if job is None:
            raise ValueError("no such actor")
        return SimpleNamespace(_actor_id=SimpleNamespace(job_id=job))

    monkeypatch.setattr(ray, "get_actor", get_actor)
    context = SimpleNamespace(get_job_id=OWN.hex)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


@pytest.mark.parametrize("job", [None, OWN])
def test_its_own_queue_or_none_is_fine(job: ray.JobID | None, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_of(job, monkeypatch)
    refuse_another_runs_queue("auto")


def test_the_queue_of_another_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    queue_of(OTHER, monkeypatch)
    with pytest.raises(UserError, match=r"ray_kwargs\.ray_init\.address='auto': another verl run \(job 02000000\)"):
        refuse_another_runs_queue("auto")
