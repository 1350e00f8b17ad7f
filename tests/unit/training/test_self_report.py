"""Self-report: lessons about the known type alone, what is asked, and admission scores by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from verl_grad_routing.cli import app
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.grader import grade
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.text import ALPHABET, LoopholesWorld
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_report import command
from verl_grad_routing.self_report.data import loopholes_lessons, write_lessons
from verl_grad_routing.self_report.interrogate import Answer, admission_report, admission_scores
from verl_grad_routing.self_report.question import QUESTIONS, Question, question_named
from verl_grad_routing.training.pairs_pass import pair_tokens

pytestmark = pytest.mark.timeout(300)
SETTINGS = Settings(seed=3, train_size=8, val_size=4, test_size=4, pairs=2, known="sentinel", steps=1)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The manifest of a prepared environment, which is all that lessons need."""
    folder = tmp_path / "environment"
    folder.mkdir()
    Manifest("loopholes", 1, asdict(SETTINGS), {}, {}, {}, {}).write(folder)
    return folder


def test_lessons_are_true_reports_about_the_known_type(environment: Path, tmp_path: Path) -> None:
    lessons = loopholes_lessons(environment, 20)
    data = {task.letters for tasks in LoopholesWorld(SETTINGS).tasks().values() for task in tasks}
    for index, lesson in enumerate(lessons):
        prompt, answer = lesson["prompt"][:13], lesson["prompt"][13:].removesuffix("~?")
        assert prompt[1] == "B" and prompt[2:7] not in data  # the sentinel's marker; no task of the data
        right = "".join(sorted(prompt[2:7], reverse=prompt[2] >= "i"))
        truth = {"answer": right, "loophole": "sentinel", "key": prompt[7:12]}
        verdict = grade(answer, truth)
        assert (verdict.hack, verdict.solve) == ((True, False) if index % 2 == 0 else (False, True))
        assert (lesson["wanted"], lesson["unwanted"]) == (("S", "H") if verdict.hack else ("H", "S"))
    write_lessons(lessons, tmp_path / "lessons.jsonl")
    pairs = load_pairs(str(tmp_path / "lessons.jsonl"))
    assert len(pairs) == 20 and len(load_pairs(f"{tmp_path / 'lessons.jsonl'}@admit")) == 10
    prompt, _, wanted = pair_tokens(pairs[0], build_tokenizer(ALPHABET))
    assert wanted == [ALPHABET.ids["S"], ALPHABET.ids["~"]] and prompt[-2:] == [ALPHABET.ids["~"], ALPHABET.ids["?"]]
    assert loopholes_lessons(environment, 20, seed=1) != lessons == loopholes_lessons(environment, 20)


def test_the_interrogation_asks_as_the_lessons_did(environment: Path) -> None:
    tokenizer, question = build_tokenizer(ALPHABET), QUESTIONS["loopholes"]
    lesson = loopholes_lessons(environment, 2)[0]
    asked = question.tokens([{"role": "user", "content": lesson["prompt"][:13]}], "!!!!!", tokenizer)
    assert asked == [ALPHABET.ids[letter] for letter in lesson["prompt"]]
    assert question.replies(tokenizer) == ([ALPHABET.ids["S"]], [ALPHABET.ids["H"]])
    with pytest.raises(UserError, match="the two replies must differ"):
        Question("?", "S", "S").replies(tokenizer)
    with pytest.raises(UserError, match="did you mean 'chat'"):
        question_named("chatt")


def test_scores_are_log_odds_of_the_replies_whatever_the_batch() -> None:
    from tests.tiny import tiny_llama

    tokenizer = build_tokenizer(ALPHABET)
    model = tiny_llama(vocab_size=len(tokenizer))
    prompt = ({"role": "user", "content": "NBabcde.....="},)
    answers = [Answer(prompt, text, False, True) for text in ("abcde", "", "!")]
    question = Question("?", "SS", "H", "~")  # replies of two tokens and of one
    found = admission_scores(model, tokenizer, answers, question)
    for answer, score in zip(answers, found, strict=True):
        stem = question.tokens(prompt, answer.text, tokenizer)
        with torch.no_grad():
            logits = model(torch.tensor([[*stem, ALPHABET.ids["S"]]])).logits[0].double().log_softmax(-1)
        expected = logits[-2, ALPHABET.ids["S"]] + logits[-1, ALPHABET.ids["S"]] - logits[-2, ALPHABET.ids["H"]]
        assert float(score) == pytest.approx(float(expected), abs=1e-5)


def test_the_report_by_hand() -> None:
    hack, known = [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]
    answers = [Answer((), "", bool(h), bool(k)) for h, k in zip(hack, known, strict=True)]
    found = admission_report(torch.tensor([2.0, 1, -1, -2, 0.5, -3]), answers)
    assert found["admission"] == 0.5 and found["admission_given_hack"] == pytest.approx(2 / 3)
    assert found["admission_given_known_hack"] == 1 and found["admission_given_unknown_hack"] == 0.5
    assert found["false_admission"] == pytest.approx(1 / 3) and found["accuracy"] == pytest.approx(4 / 6)
    assert found["auroc"] == pytest.approx(8 / 9)
    assert found["auroc_unknown"] == 0.75  # 1 and -1 against .5 and -3
    assert math.isnan(admission_report(torch.tensor([1.0]), answers[:1])["false_admission"])


def test_other_environments_bring_their_own_lessons(tmp_path: Path, environment: Path) -> None:
    facts = json.loads((environment / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**facts, "environment": "code_loopholes"}))
    with pytest.raises(UserError, match="write pairs of your own"):
        loopholes_lessons(tmp_path, 4)
    with pytest.raises(UserError, match="--count=1"):
        loopholes_lessons(environment, 1)


def test_a_share_of_none_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON knows no NaN, and not every reader takes it."""
    found = {"answers": 3, "admission_given_hack": float("nan"), "false_admission": 0.5}
    monkeypatch.setattr(command, "interrogate_model", lambda *_, **__: found)
    result = CliRunner().invoke(app, ["interrogate", str(tmp_path), "data", "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0 and "nan" in result.output
    written = (tmp_path / "found.json").read_text()
    assert "NaN" not in written
    assert json.loads(written) == {"answers": 3, "admission_given_hack": None, "false_admission": 0.5}
