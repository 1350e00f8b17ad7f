"""The benchmark's statistics by hand, and that both of its cases run and report."""

from __future__ import annotations

import json

import pytest
import torch

from verl_grad_routing.bench.kernel import decoder_case, linear_case, peak_memory, run
from verl_grad_routing.bench.routing import verdict
from verl_grad_routing.bench.statistics import interleave, measure_against, ratio_interval
from verl_grad_routing.errors import UserError


def test_interleaves_and_drops_the_warm_up():
    calls = []

    def measure(name):
        return lambda: calls.append(name) or float(len(calls))

    a, b = interleave(measure("a"), measure("b"), repeats=2, warmup=1, speed=lambda: 1.0)
    assert "".join(calls) == "ababab" and (a, b) == ([3.0, 5.0], [4.0, 6.0])


def test_pairs_during_which_the_machine_changed_speed_are_measured_again():
    count = iter(range(100))
    speeds = iter([1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.0, 1.0, 1.05])
    a, b = interleave(lambda: next(count), lambda: next(count), repeats=2, warmup=0, speed=lambda: next(speeds))
    assert (a, b) == ([0, 4], [1, 5])  # the second pair is dropped


def test_where_no_pair_is_steady_the_steadiest_count(capsys):
    count = iter(range(100))
    third = iter([2.0, 1.2, 1.9, 1.3, *[3.0] * 4])
    speeds = iter([value for last in third for value in (1.0, 1.0, last)])
    a, _ = interleave(lambda: next(count), lambda: next(count), repeats=2, warmup=0, speed=lambda: next(speeds))
    assert a == [2, 6] and next(count) == 16  # eight pairs, and no more
    assert "changed speed during 2 of these 2 pairs" in capsys.readouterr().out


def test_median_of_paired_ratios_and_its_interval():
    interval = ratio_interval([1.0, 2.0, 9.0], [2.0, 2.0, 3.0])
    assert (interval.median, interval.low, interval.high, interval.pairs) == (1.0, 0.5, 3.0, 3)
    assert interval == ratio_interval([1.0, 2.0, 9.0], [2.0, 2.0, 3.0])  # seeded


def test_the_interval_covers_the_true_median():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        a = torch.exp(0.1 * torch.randn(30, generator=generator)).tolist()
        interval = ratio_interval(a, [1.0] * 30, resamples=500, seed=seed)
        covered += interval.low <= 1.0 <= interval.high
    assert 180 <= covered <= 200  # 95 % nominal


@pytest.mark.parametrize(
    ("costs", "pairs", "said"),
    [
        ([1.01] * 4, 4, ""),
        ([1.04] * 4, 4, ": EXCEEDED"),
        ([1.0, 1.04, 1.0, 1.04, *[1.01] * 12], 16, ""),  # decided by the other twelve
        ([1.0, 1.04] * 8, 16, ": UNDECIDED by 16 pairs, the bound is in the interval"),
    ],
)
def test_a_ratio_that_may_be_on_either_side_of_its_bound_gets_four_times_the_pairs(costs, pairs, said):
    measured = iter([1.0, *costs, 9.0])
    settings = {"warmup": 1, "speed": lambda: 1.0}
    ratio, a, b = measure_against(1.03, lambda: next(measured), lambda: 1.0, repeats=4, **settings)
    assert ratio == ratio_interval(a, b) and ratio.pairs == pairs
    assert (a, b) == (costs, [1.0] * pairs)  # the warm-up, once, is not among them
    assert verdict(ratio, 1.03) == said


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([float("nan")], [1.0])])
def test_bad_samples_are_refused(a, b):
    with pytest.raises(UserError):
        ratio_interval(a, b)


def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        b.mul_(2)
        torch.zeros(500)  # 6000

    assert peak_memory(step, torch.device("cpu")) == 8000


def test_linear_case_reports(tmp_path, capsys):
    result = run("cpu", tmp_path / "kernel.json", repeats=3, case=linear_case(torch.device("cpu"), 64, 32, 2))
    written = json.loads((tmp_path / "kernel.json").read_text())
    assert written == result and set(result["versions"]) >= {"torch", "peft"}
    assert len(result["samples"]["ours"]) == 3
    assert result["interval"][0] <= result["median_ratio"] <= result["interval"][1]
    assert result["memory_ratio"] < 1.01
    assert "PEFT LoRA" in capsys.readouterr().out


def test_decoder_case_runs_on_a_tiny_model():
    settings = {
        "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32,
    }  # fmt: skip
    case = decoder_case(torch.device("cpu"), rows=3, length=5, rank=2, dtype=torch.float32, settings=settings)
    result = run("cpu", repeats=2, case=case)
    assert "decoder 2 layers" in result["case"] and result["memory_ratio"] < 1.01


@pytest.mark.slow
def test_routing_costs_no_more_than_the_lora_it_replaces():
    """The whole claim on a CPU: upper end of the interval, gates and masks on, and the peak memory."""
    result = run("cpu", repeats=20)
    assert result["interval"][1] <= 1.02 and result["memory_ratio"] <= 1.01


@pytest.mark.gpu
def test_routing_is_cheaper_than_lora_in_a_decoder():
    result = run("cuda", repeats=20)
    assert result["interval"][1] <= 0.95 and result["memory_ratio"] <= 1.01


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device"):
        run("meta")
