"""Rejection fine-tuning: what is sampled, scored, chosen and handed to verl. A real one: tests/e2e/test_rft.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from verl_grad_routing.commands.rft import detector_settings
from verl_grad_routing.errors import UserError
from verl_grad_routing.rejection import Rft, rft
from verl_grad_routing.rejection.choose import choose, report
from verl_grad_routing.rejection.data import KeptResponses, write_rows
from verl_grad_routing.rejection.sample import Sample, reward_function, sample, shuffled

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's model as initialised: it says anything."""
    from verl_grad_routing.envs.chars.model import new_model, save
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    folder = tmp_path_factory.mktemp("model")
    save(new_model(ALPHABET, 0), build_tokenizer(ALPHABET), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.parquet

    from verl_grad_routing.envs.loopholes.settings import Settings
    from verl_grad_routing.envs.loopholes.text import LoopholesWorld

    world = LoopholesWorld(Settings())
    rows = [world.row(index, "train", task) for index, task in enumerate(world.tasks()["train"][:12])]
    file = tmp_path_factory.mktemp("data") / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def settings(model: Path, data: Path, **given: object) -> Rft:
    return Rft(model, data, **{"max_tokens": 5, "detector": {"rules": ["^a"]}, **given})  # type: ignore[arg-type]


def one(number: int, reward: float = 1.0, response: tuple[int, ...] = (5, 2), **facts: float) -> Sample:
    return Sample(f"{number}_0", (7, 8, 9), response, "prompt", f"text {number}", reward, facts)


# ---- choosing ----


def test_the_lowest_scores_are_kept_and_none_above_a_half(model: Path, data: Path) -> None:
    correct = [one(number) for number in range(6)]
    scores = [0.4, 0.9, 0.1, 0.5, 0.51, 0.1]
    assert choose(settings(model, data), correct, scores) == [2, 5, 0, 3]
    assert choose(settings(model, data, keep=2), correct, scores) == [2, 5]
    assert choose(settings(model, data, filter="none", keep=4), correct, None) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="no response is left"):
        choose(settings(model, data), correct[:1], [0.9])


def test_the_control_keeps_as_many_at_random(model: Path, data: Path) -> None:
    scores = [index / 100 for index in range(100)]
    correct = [one(number, hack=float(number > 50)) for number in range(100)]
    control = settings(model, data, filter="permuted")
    kept = choose(control, correct, scores)
    assert len(kept) == len(choose(settings(model, data), correct, scores)) == 51
    assert sorted(shuffled(scores, 0)) == scores
    found = report(control, correct, correct, scores, kept)
    assert 0.3 < found["hack_kept"] < 0.7  # the base rate is .49
    assert report(settings(model, data), correct, correct, scores, list(range(51)))["hack_kept"] == 0


def test_the_report_counts(model: Path, data: Path) -> None:
    samples = [one(0, hack=1, solve=0), one(1, hack=0, solve=1), one(2, 0.0, hack=0, solve=0)]
    found = report(settings(model, data), samples, samples[:2], [0.9, 0.1], [1])
    assert (found["samples"], found["correct"], found["kept"], found["predicted_clean"]) == (3, 2, 1, 1)
    assert (found["hack_samples"], found["hack_correct"], found["hack_kept"]) == (1 / 3, 1 / 2, 0)
    assert (found["auroc"], found["f1_hack"], found["f1_clean"]) == (1, 1, 1)
    assert "hack_kept" not in report(settings(model, data), [one(0)], [one(0)], [0.1], [0])


# ---- sampling ----


def test_responses_end_with_their_end_of_sequence(model: Path, data: Path) -> None:
    from verl_grad_routing.envs.loopholes.grader import grade
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    found = sample(settings(model, data, samples=3, temperature=1.0, prompts=8))
    assert [row.key for row in found] == [f"{prompt}_{number}" for prompt in range(8) for number in range(3)]
    assert found == sample(settings(model, data, samples=3, temperature=1.0, prompts=8))
    assert found != sample(settings(model, data, samples=3, temperature=1.0, prompts=8, seed=1))
    for row in found:
        assert ALPHABET.eos_id not in row.response[:-1] and 1 <= len(row.response) <= 5
        assert len(row.prompt) == 13 and set(row.facts) == {"hack", "solve", "known"}
    import pyarrow.parquet

    truth = pyarrow.parquet.read_table(data).to_pylist()[0]["reward_model"]["ground_truth"]
    assert found[0].reward == grade(found[0].response_text, truth).score


@pytest.mark.parametrize("path", ["nowhere", "os:nothing", "json:__doc__", ":f"])
def test_a_reward_function_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="--reward"):
        reward_function(path, {"data_source": "loopholes"})


def test_data_of_no_environment_need_a_reward_function() -> None:
    with pytest.raises(UserError, match="module:function"):
        reward_function(None, {"data_source": "gsm8k"})


# ---- scoring ----


def test_batched_fingerprints_are_those_of_one_at_a_time(model: Path) -> None:
    from verl_grad_routing.fingerprints import GradientProbe
    from verl_grad_routing.rejection.score import _fingerprints, _loaded, adjacent_cosines

    generator = torch.Generator().manual_seed(0)
    lengths = (2, 5, 3, 4)
    rows = [
        one(number, response=tuple(torch.randint(2, 40, (length,), generator=generator).tolist()))
        for number, length in enumerate(lengths)
    ]
    net, probe = _loaded(model), GradientProbe((1, 3), dim=64)
    together = _fingerprints(net, rows, probe)
    alone = torch.cat([_fingerprints(net, [row], probe) for row in rows])
    assert together.shape == (4, 64)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(4))
    assert all(parameter.grad is None for parameter in net.parameters())
    cosines = adjacent_cosines(_loaded(model), rows)
    assert torch.allclose(cosines, torch.cat([adjacent_cosines(_loaded(model), [row]) for row in rows]), atol=1e-5)


def test_an_abstaining_detector_ends_the_command(model: Path) -> None:
    from verl_grad_routing.rejection.score import build_detector, grift_scores

    detector = build_detector({"rules": ["^a"], "num_layers": 1}, 1.0)
    with pytest.raises(UserError, match="few correct responses"):
        grift_scores(model, [one(number) for number in range(3)], detector)


# ---- what verl gets ----


@pytest.mark.parametrize("full_text", [True, False])
def test_verl_learns_the_response_and_the_prompt_if_asked(full_text: bool, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    write_rows(tmp_path / "kept.jsonl", [one(0), one(1, response=(4, 4, 2))], full_text)
    rows = KeptResponses(str(tmp_path / "kept.jsonl"), None, OmegaConf.create({"max_length": 6}))
    assert rows[1]["input_ids"].tolist() == [7, 8, 9, 4, 4, 2]
    assert rows[1]["loss_mask"].tolist() == [0, int(full_text), int(full_text), 1, 1, 1]
    batch = SFTTensorCollator("no_padding")([rows[0], rows[1]])
    assert batch["input_ids"].offsets().diff().tolist() == [5, 6]
    with pytest.raises(UserError, match="6 tokens"):
        KeptResponses(str(tmp_path / "kept.jsonl"), None, OmegaConf.create({"max_length": 5}))


# ---- bad input ----


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"filter": "grif"}, "--filter"),
        ({"engine": "sglang"}, "--engine"),
        ({"samples": 0}, "--samples"),
        ({"samples": 2}, "--temperature"),
        ({"temperature": -1.0}, "--temperature"),
        ({"keep": 0}, "--keep"),
        ({"prompts": 0}, "--prompts"),
        ({"lr": 0.0}, "--lr"),
        ({"batch_size": 3, "ranks": 2}, "--batch-size"),
    ],
)
def test_bad_settings(model: Path, data: Path, given: dict, key: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(model, data, **given)
    assert caught.value.key == key


def test_bad_files(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MODEL"):
        settings(tmp_path, data)
    with pytest.raises(UserError, match="--data"):
        settings(model, tmp_path / "none.parquet")
    with pytest.raises(UserError, match="--to"):
        rft(settings(model, data), tmp_path)


def test_a_detector_that_cannot_work_ends_before_sampling(model: Path, data: Path, tmp_path: Path) -> None:
    for detector, named in (({}, "rules"), ({"rules": ["("]}, "rules"), ({"rules": ["a"], "rank": 0}, "rank")):
        with pytest.raises(UserError, match=named):
            rft(settings(model, data, detector=detector), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_correct_leaves_nothing_behind(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--positive-reward"):
        rft(settings(model, data, prompts=2, positive_reward=2.0), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_lines_settings_of_the_detector() -> None:
    assert detector_settings(["^a"], None, False, ["layers=[1, 2]", "dim=64"]) == {
        "rules": ["^a"],
        "layers": [1, 2],
        "dim": 64,
    }
    assert detector_settings(None, "m:f", True, []) == {"judge": "m:f", "label_by": "gt_anchor"}
    with pytest.raises(UserError, match="key=value"):
        detector_settings(None, None, False, ["dim"])


def test_the_report_is_json(model: Path, data: Path) -> None:
    facts = [one(0, hack=0.0), one(1, hack=0.0)]
    assert json.loads(json.dumps(report(settings(model, data), facts, facts, [0.1, 0.2], [0, 1])))["f1_hack"] is None
