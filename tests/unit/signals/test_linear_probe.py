"""Linear probes: fitting against scikit-learn, the threshold by hand, the file, and the detector that reads it."""

import dataclasses
import math

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.preprocessing import StandardScaler

from verl_grad_routing.detectors import DETECTORS, Signal, checked_scores
from verl_grad_routing.detectors.probe_file import LinearProbe, load_probe, save_probe
from verl_grad_routing.errors import UserError
from verl_grad_routing.probes.fit import FitSettings, fit_probe, threshold_at
from verl_grad_routing.probes.rollouts import Rollout, data_hash, load_rollouts

ORIGIN = {"layers": (2, 3), "position": "resp_mean", "origin": "labels", "data_hash": "d", "model_hash": "m"}


def rollouts(count=400, gap=2.0):
    """Pooled activations [N, 2, 4] whose first feature tells the kinds apart, labels, and groups of four."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(count, generator=generator) < 0.4
    pooled = torch.randn(count, 2, 4, generator=generator) * torch.tensor([1.0, 5, 0.1, 30])
    pooled[:, 0, 0] += gap * labels
    return pooled, labels.tolist(), [row // 4 for row in range(count)]


def test_the_fit_is_scikit_learns_on_standardised_features():
    pooled, labels, groups = rollouts()
    settings = FitSettings(seed=3)
    probe = fit_probe(pooled, labels, groups, settings, **ORIGIN)
    features, truth = pooled.flatten(1).double().numpy(), np.array(labels)
    split = GroupShuffleSplit(1, test_size=0.3, random_state=3).split(features, truth, groups)
    fitted, held = next(split)
    scaler = StandardScaler().fit(features[fitted])
    reference = LogisticRegression(C=1.0, max_iter=5000).fit(scaler.transform(features[fitted]), truth[fitted])
    expected = reference.decision_function(scaler.transform(features[held]))
    found = features[held] @ probe.weights_Ld.flatten().numpy() + probe.bias
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    # no prompt is on both sides
    assert not {groups[row] for row in fitted} & {groups[row] for row in held}
    clean = expected[~truth[held]]
    assert (clean > probe.threshold).mean() <= 0.05 < (clean >= probe.threshold).mean() + 0.02
    report = probe.report
    assert report["held_out_false_positive_rate"] == (clean > probe.threshold).mean()
    assert report["held_out_recall"] == (expected[truth[held]] > probe.threshold).mean() > 0.5
    assert report["held_out_auroc"] > 0.85 and report["rollouts"] == 400 and report["prompts"] == 100


def test_without_a_difference_the_probe_is_at_chance():
    pooled, labels, groups = rollouts(gap=0.0)
    assert fit_probe(pooled, labels, groups, FitSettings(), **ORIGIN).report["held_out_auroc"] == pytest.approx(
        0.5, abs=0.12
    )


@pytest.mark.parametrize(("rate", "expected"), [(0.05, 19.0), (0.1, 18.0), (0.0, 20.0), (0.049, 20.0), (1.0, 1.0)])
def test_the_threshold_by_hand(rate, expected):
    clean = np.random.default_rng(0).permutation(np.arange(1.0, 21.0))
    assert threshold_at(clean, rate) == expected
    assert (clean > threshold_at(clean, rate)).mean() <= rate or rate == 0


def test_a_file_keeps_everything(tmp_path):
    pooled, labels, groups = rollouts(80)
    probe = fit_probe(pooled, labels, groups, FitSettings(), **ORIGIN)
    save_probe(probe, tmp_path / "p.safetensors")
    again = load_probe(tmp_path / "p.safetensors")
    assert torch.equal(again.weights_Ld, probe.weights_Ld) and again.content_hash == probe.content_hash
    for field in ("bias", "threshold", "layers", "position", "origin", "data_hash", "model_hash", "report"):
        assert getattr(again, field) == getattr(probe, field)
    assert dataclasses.replace(probe, threshold=1.0).content_hash != probe.content_hash


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p, y, g: (p, y, [0] * len(g)), "one prompt"),
        (lambda p, y, g: (p[:8], [True] + [False] * 7, g[:8]), "rollouts of one kind are"),
    ],
)
def test_too_little_data_is_one_line(change, told):
    with pytest.raises(UserError, match=told):
        fit_probe(*change(*rollouts(80)), FitSettings(), **ORIGIN)


# ---- the detector ----


def test_the_score_is_the_logit_above_the_threshold(make_detector, make_view):
    detector = make_detector("linear_probe")
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(12, 2, 16, generator=generator)  # as make_view draws it
    logits = (pooled.double() * detector.probe.weights_Ld).sum((1, 2)) + 0.25
    scores = checked_scores(detector, make_view(detector))
    torch.testing.assert_close(scores, torch.sigmoid(logits - 0.5), rtol=1e-5, atol=1e-6)
    judged, flagged = detector.verdicts(make_view(detector), scores)
    assert judged.all() and torch.equal(flagged, logits > 0.5)
    assert detector.position == "resp_mean" and detector.resolve_layers(4) == (2, 3)


def test_it_declares_who_labelled_its_data_and_sees_no_facts(make_detector, tmp_path):
    assert make_detector("linear_probe").signal is Signal.labels
    for origin in ("monitor", "pairs"):
        path = tmp_path / f"{origin}.safetensors"
        save_probe(LinearProbe(torch.ones(2, 16), 0.0, 0.0, (2, 3), "resp_last", origin, "d", "m", {}), path)
        detector = make_detector("linear_probe", probe=str(path))
        assert detector.signal is Signal(origin) and detector.reads == frozenset() and not detector.knows_everything
    with pytest.raises(UserError, match="origin='guess': choose one of labels, monitor, pairs"):
        LinearProbe(torch.ones(2, 16), 0.0, 0.0, (2, 3), "resp_last", "guess", "d", "m", {})


def test_what_does_not_fit_is_one_line(make_detector, tmp_path):
    detector = make_detector("linear_probe", fitted=False)
    with pytest.raises(UserError, match=r"probe=.*reads layer 3, and the model has layers 1 to 2"):
        detector.resolve_layers(2)
    with pytest.raises(UserError, match=r"probe=.*fitted on hidden size 16, and the model has 32"):
        detector.fit(None, None, (2, 3), 32)
    build = lambda **settings: DETECTORS.build({"name": "linear_probe", **settings}, "grad_routing.detector")  # noqa: E731
    file = detector.config.probe
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, other)
    (tmp_path / "text.safetensors").write_text("no")
    for settings, told in (
        ({}, "grad_routing.detector.probe='': give the file"),
        ({"probe": "nowhere"}, "no such file; make one: vgr probe fit"),
        ({"probe": str(other)}, "not a probe"),
        ({"probe": str(tmp_path / "text.safetensors")}, "not a safetensors file"),
        ({"probe": file, "layers": [1]}, "layers=.*leave null"),
        ({"probe": file, "refresh_every": 2, "score_pass": "policy"}, "refresh_every=2: set 0"),
    ):
        with pytest.raises(UserError, match=told):
            build(**settings)


def test_a_resumed_run_needs_the_same_probe(make_detector, tmp_path):
    first = make_detector("linear_probe")
    state = first.state_dict()
    make_detector("linear_probe").load_state_dict(state)
    path = tmp_path / "second.safetensors"
    save_probe(dataclasses.replace(first.probe, threshold=0.75), path)
    with pytest.raises(UserError, match="started with another probe"):
        make_detector("linear_probe", probe=str(path)).load_state_dict(state)


# ---- labelled rollouts ----


class Letters:
    """A tokenizer of letters whose end of sequence is 0."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, **_):
        return [1, *(ord(letter) for message in messages for letter in message["content"])]


def test_rollouts_from_parquet(tmp_path):
    chat = [{"role": "user", "content": "q"}]
    table = pandas.DataFrame({"prompt": ["p", "q"], "response": ["ab", "c"], "bad": [0, 1]})
    table.to_parquet(tmp_path / "text.parquet")
    found = load_rollouts(tmp_path / "text.parquet", "bad", Letters())
    assert found == [Rollout((112,), (97, 98, 0), (1, 1, 1), False), Rollout((113,), (99, 0), (1, 1), True)]
    pandas.DataFrame({"prompt": [chat, chat], "response": ["a", "b"], "bad": [0, 1]}).to_parquet(tmp_path / "c.parquet")
    assert load_rollouts(tmp_path / "c.parquet", "bad", Letters())[0].prompt == (1, 113)
    assert data_hash(found) != data_hash([found[0], dataclasses.replace(found[1], unwanted=False)])
    with pytest.raises(UserError, match="no column 'hack'"):
        load_rollouts(tmp_path / "text.parquet", "hack", Letters())
    with pytest.raises(UserError, match="no such file or folder"):
        load_rollouts(tmp_path / "no", "hack", Letters())


def recorded(folder, facts):
    jagged = lambda rows: torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)  # noqa: E731
    rows = len(facts)
    fields = {
        "prompts": jagged([[5, 6]] * rows),
        "responses": jagged([[7, 8, row] for row in range(rows)]),
        "response_mask": jagged([[1, 0, 1]] * rows),
        "extra_fields": [{"reward_extra_info": fact} for fact in facts],
    }
    tags = [{}] * (rows - 1) + [{"is_padding": True}]
    torch.save({"keys": list(range(rows)), "tags": tags, "fields": fields}, folder / "batch_000001.pt")


def test_rollouts_from_recorded_batches(tmp_path):
    with pytest.raises(UserError, match=r"record some with grad_routing.record_dir"):
        load_rollouts(tmp_path, "hack", None)
    recorded(tmp_path, [{"hack": 0.0}, {"hack": 1.0}, {}])  # the last row is padding
    found = load_rollouts(tmp_path, "hack", None)
    assert found == [Rollout((5, 6), (7, 8, 0), (1, 0, 1), False), Rollout((5, 6), (7, 8, 1), (1, 0, 1), True)]
    with pytest.raises(UserError, match=r"--label='lie': batch_000001.pt has the grader's facts \['hack'\]"):
        load_rollouts(tmp_path, "lie", None)
    recorded(tmp_path, [{"hack": 0.0}, {"hack": 0.0}, {}])
    with pytest.raises(UserError, match="both kinds; found 2, all clean"):
        load_rollouts(tmp_path, "hack", None)


def test_activations_are_those_after_each_block_whatever_the_batch():
    from tests.tiny import tiny_llama
    from verl_grad_routing.probes.activations import pooled_activations

    model = tiny_llama(vocab_size=30, num_hidden_layers=3)
    rows = [Rollout((1, 2, 3), tuple(range(n)), (1,) * (n - 1) + (0,) if n > 1 else (1,), False) for n in (5, 1, 9, 2)]
    found = pooled_activations(model, rows, (1, 2), "resp_mean", batch=3)
    last = pooled_activations(model, rows, (1, 2), "resp_last")
    for row, pooled, end in zip(rows, found, last, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([[*row.prompt, *row.response]]), output_hidden_states=True).hidden_states
        counted = [3 + index for index, used in enumerate(row.mask) if used]
        for layer, vector, final in zip((1, 2), pooled, end, strict=True):
            torch.testing.assert_close(vector, hidden[layer][0, counted].mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(final, hidden[layer][0, counted[-1]], rtol=1e-4, atol=1e-5)
    assert not math.isnan(float(found.sum()))
