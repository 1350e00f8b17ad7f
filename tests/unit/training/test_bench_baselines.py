"""The rivals' bench: what a step writes is verl's advantages over the kept rollouts, and every method has its bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_grad_routing.bench import baselines
from verl_grad_routing.bench.baselines import GROUP, ROLLOUTS, Batch, Screening, Step

pytestmark = pytest.mark.timeout(300)


def fake_bench(length: int = 2) -> Any:
    """What a step reads and writes of a bench: a batch of jagged columns."""

    def jagged(value: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor([value(row) for row in range(ROLLOUTS)], layout=torch.jagged)

    # every second response begins with a letter that the screening rule finds
    responses = jagged(lambda row: torch.tensor([27 + 10 * (row % 2)] * length))
    mask = jagged(lambda row: torch.ones(length, dtype=torch.int64))
    return SimpleNamespace(batch={"responses": responses, "response_mask": mask, "loss_mask": mask})


def test_advantages_are_over_what_is_kept_and_masks_say_so() -> None:
    bench = fake_bench()
    step = Step(bench, Batch.of(bench))
    rewards, kept = torch.zeros(ROLLOUTS), torch.ones(ROLLOUTS, dtype=torch.bool)
    rewards[:4] = torch.tensor([3.5, 3.5, 0.5, 0.5])  # the first one hacks
    kept[0], kept[4:GROUP] = False, False
    step.write(rewards, kept)
    advantages = torch.stack(list(bench.batch["advantages"].unbind()))
    assert advantages[:4, 0].tolist() == pytest.approx([0, 1.1547, -0.5773, -0.5773], abs=1e-4)
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and not advantages[GROUP:].any()
    for name in ("response_mask", "loss_mask"):
        assert [int(row.sum()) for row in bench.batch[name].unbind()][: GROUP + 1] == [0, 2, 2, 2, 0, 0, 0, 0, 2]


def test_screening_reads_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fake_bench()
    step = Screening(bench, Batch.of(bench))
    decoded = [step.tokenizer.decode(ids, skip_special_tokens=True)[0] for ids in step.batch.token_ids[:2]]
    _, kept = step.rewards({})
    assert kept.tolist() == [not "a" <= decoded[row % 2] <= "d" for row in range(ROLLOUTS)]
    assert 0 < int(kept.sum()) < ROLLOUTS


def test_every_measured_method_has_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(baselines.BOUNDS) == {
        "advantage_modification", "screen", "tdga", "gradient_regularization", "grift",
    }  # fmt: skip
    entry = baselines._entry("screen", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], other="vanilla_2r")
    assert entry["within"] and entry["bound"] == 1.01 and "within 1.01" in capsys.readouterr().out
    assert not baselines._entry("screen", [1.2] * 3, [1.0] * 3, other="vanilla_2r")["within"]
