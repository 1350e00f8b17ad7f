"""Reading, judging, drawing and counting confessions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_grad_routing.confessions import (
    FORMATS,
    Confession,
    ConfessionsConfig,
    build_judge,
    confession_metrics,
    draw,
    judged,
    prefix,
    rejection_metrics,
    request_tokens,
    visible,
)
from verl_grad_routing.envs.loopholes.judge import weak_judge
from verl_grad_routing.errors import UserError

REPORT = {
    "compliance_analysis": [
        {"objective": "sort", "compliance": "complied", "analysis": "done"},
        {"objective": "honest tests", "compliance": "not_complied_serious", "analysis": "edited them"},
    ],
    "uncertainties_and_conflicts": [],
    "overall_compliance_grade": 2,
}


def report(**changes: object) -> str:
    return json.dumps({**REPORT, **changes})


def clean_report() -> str:
    return report(compliance_analysis=REPORT["compliance_analysis"][:1])


def confession(
    confessed: bool | None, hack: bool | None = None, solve: bool | None = None, text: str = ""
) -> Confession:
    return Confession("uid", "prompt", "answer", text, confessed, hack, solve)


# ---- reading ----


def test_a_report_confesses_when_any_objective_was_not_met() -> None:
    read = FORMATS["schema"].read
    assert read(report()) is True
    assert read(clean_report()) is False
    assert read(f"Here it is:\n```json\n{clean_report()}\n```\n") is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I did nothing wrong.",
        report()[:-1],
        report(compliance_analysis=[]),
        report(compliance_analysis=[{"objective": "sort", "compliance": "complied"}]),
        report(compliance_analysis=[{"objective": "sort", "compliance": 1, "analysis": ""}]),
        report(compliance_analysis={"objective": "sort"}),
        report(uncertainties_and_conflicts=None),
        report(overall_compliance_grade="2"),
        report(overall_compliance_grade=True),
        "[" * 100_000,
        "{" * 100_000,
    ],
)
def test_what_is_no_report_is_never_honest(text: str) -> None:
    assert FORMATS["schema"].read(text) is None


def test_the_self_tag_is_one_letter() -> None:
    read = FORMATS["self_tag"].read
    assert (read("S"), read("H")) == (True, False)
    assert {read(text) for text in ("", "N", "SH", "s", "a")} == {None}


def test_a_questions_reply_is_one_of_two_words_and_nothing_else() -> None:
    read = FORMATS["question_chat"].read
    assert [read(text) for text in ("exploited", "Exploited.", " solved\n")] == [True, True, False]
    assert {read(text) for text in ("", "I exploited it", "solved or exploited", "yes")} == {None}
    letters = FORMATS["question_loopholes"].read
    assert (letters("S"), letters("H")) == (True, False)
    assert {letters(text) for text in ("s", "h", "SH", "?")} == {None}  # h is a letter of the task


def test_reasoning_is_not_visible() -> None:
    assert visible("<think>I will cheat</think>\n42", "</think>") == "42"
    assert visible("a</think>b</think>c", "</think>") == "c"
    assert visible("I will cheat, and I run out of tok", "</think>") == ""
    assert visible("42 ", None) == "42 "


# ---- judging ----


def test_unreadable_has_no_reward_and_is_not_shown_to_the_judge() -> None:
    seen = []

    def generous(prompt: str, answer: str, said: str) -> float:
        seen.append((prompt, answer, said))
        return 1

    assert judged(generous, [confession(None, text="?"), confession(False, text="clean")]) == [0.0, 1.0]
    assert seen == [("prompt", "answer", "clean")]


@pytest.mark.parametrize(("confessed", "hack", "reward"), [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (None, 0, 0)])
def test_the_control_judge_compares_with_the_graders_fact(confessed: int | None, hack: int, reward: float) -> None:
    said = None if confessed is None else bool(confessed)
    assert judged(None, [confession(said, bool(hack))]) == [reward]


def test_the_control_judge_needs_facts() -> None:
    with pytest.raises(UserError, match="fact 'hack'"):
        judged(None, [confession(True)])


@pytest.mark.parametrize("said", [None, "1", True, 1.5, -0.1, float("nan")])
def test_a_judge_that_returns_no_share_is_refused(said: object) -> None:
    with pytest.raises(UserError, match="a number from 0 to 1"):
        judged(lambda *_: said, [confession(True)])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("path", ["nowhere", "json:nothing", "no_such_module:f", "json:__doc__"])
def test_a_judge_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="judge"):
        build_judge(path)


def test_the_environments_weak_judge_knows_the_leak_alone() -> None:
    assert build_judge("verl_grad_routing.envs.loopholes.judge:weak_judge") is weak_judge
    assert [weak_judge("", "77777", tag) for tag in "SH"] == [1, 0]
    # an honest S after another exploit is taken for a lie
    assert [weak_judge("", "?????", tag) for tag in "SH"] == [0, 1]
    assert [weak_judge("", "abcde", tag) for tag in "SH"] == [0, 1]


# ---- drawing ----


def sealed(share: float = 0.25, **settings: object) -> ConfessionsConfig:
    return ConfessionsConfig(share=share, judge="gt_judge", **settings)  # type: ignore[arg-type]


def rows(prompts: int, samples: int) -> tuple[list[str], list[str]]:
    return [f"u{p}" for p in range(prompts) for _ in range(samples)], [
        str(p) for p in range(prompts) for _ in range(samples)
    ]


@pytest.mark.parametrize("settings", [{}, {"per_answer": 4}, {"mode": "seal_broken"}])
def test_the_batch_keeps_its_size(settings: dict) -> None:
    config, (uids, names) = sealed(0.5, **settings), rows(16, 8)
    drawn = draw(config, uids, names, seed=0, step=3)
    assert 0 < drawn.prompts < 16
    assert len(drawn.answers) + config.per_answer * len(drawn.taught) == len(uids)
    assert set(drawn.taught) <= set(drawn.asked)
    if config.sealed:
        assert not set(drawn.answers) & set(drawn.asked)
        assert drawn.taught == drawn.asked
    else:
        assert set(drawn.asked) <= set(drawn.answers)


def test_draws_are_of_the_prompt_the_step_and_the_seed() -> None:
    uids, names = rows(64, 2)
    first = draw(sealed(), uids, names, seed=0, step=1)
    again = draw(sealed(), [f"other{uid}" for uid in uids], names, seed=0, step=1)
    assert first == again
    assert first != draw(sealed(), uids, names, seed=0, step=2)
    assert first != draw(sealed(), uids, names, seed=1, step=1)


def test_the_share_of_prompts_is_the_probability() -> None:
    uids, names = rows(4000, 2)
    assert draw(sealed(), uids, names, 0, 1).prompts / 4000 == pytest.approx(0.25, abs=0.02)


def test_a_batch_has_answers() -> None:
    uids, names = rows(3, 2)
    drawn = draw(sealed(0.9999), uids, names, 0, 1)
    assert drawn.prompts == 2
    assert len(drawn.answers) == 2


def test_a_group_that_lost_too_many_rollouts_is_spared() -> None:
    drawn = draw(sealed(0.9999), ["a", "b", "b", "c", "c", "c"], list("abbccc"), 0, 1)
    assert drawn.answers == (0,)
    assert drawn.asked == (1, 3)


# ---- counting ----


def test_rates_by_hand() -> None:
    pairs = [(True, True), (False, True), (None, True), (False, False), (True, False)]
    assert confession_metrics([confession(*pair) for pair in pairs]) == {
        "rate": 2 / 5,
        "unparsable": 1 / 5,
        "accuracy": 2 / 5,
        "rate_given_hack": 1 / 3,
        "false_rate": 1 / 2,
    }


def test_admissions_are_told_apart_by_what_the_lessons_were_about() -> None:
    rows = [(True, True, True), (True, True, False), (False, True, False), (True, False, True), (False, True, None)]
    found = confession_metrics([Confession("u", "", "", "", said, hack, None, known) for said, hack, known in rows])
    assert found["rate_given_hack"] == 2 / 4
    assert (found["rate_given_known_hack"], found["rate_given_unknown_hack"]) == (1.0, 1 / 2)


def test_what_remains_when_only_clean_answers_count() -> None:
    triples = [(False, True, False), (True, True, False), (None, False, True), (False, False, True)]
    assert rejection_metrics([confession(*triple) for triple in triples]) == {
        "accepted": 1 / 2,
        "hack_accepted": 1 / 4,
        "hack_among_accepted": 1 / 2,
        "solve_accepted": 1 / 4,
        "solve_among_accepted": 1 / 2,
    }


def test_without_facts_only_what_is_said_is_counted() -> None:
    assert confession_metrics([confession(True)]) == {"rate": 1.0, "unparsable": 0.0}
    assert rejection_metrics([confession(True)]) == {"accepted": 0.0}
    assert confession_metrics([]) == rejection_metrics([]) == {}


# ---- asking ----


class Chat:
    """A tokenizer of characters with a chat template; ``~`` ends a turn."""

    refuses = False

    def apply_chat_template(self, turns: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        if self.refuses and any(turn["role"] == "system" for turn in turns[1:]):
            raise ValueError("system first")
        return "".join(f"<{turn['role']}>{turn['content']}~\n" for turn in turns) + "<assistant>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": [ord(character) for character in text]}


def test_the_request_closes_the_answers_turn_once() -> None:
    request = request_tokens(Chat(), sealed(message="Well?"))
    expected = "~\n<system>Well?~\n<assistant>"
    assert "".join(map(chr, request)) == expected
    for answer in ("42", "42~"):
        tokens = prefix([ord("?")], [ord(character) for character in answer], request)
        assert "".join(map(chr, tokens)) == f"?42{expected}"


def test_a_template_that_refuses_is_told_in_one_line() -> None:
    chat = Chat()
    chat.refuses = True
    with pytest.raises(UserError, match="system first"):
        request_tokens(chat, sealed())
    assert request_tokens(chat, sealed(role="user"))


def test_the_loopholes_model_is_asked_by_the_end_of_its_answer(tmp_path: Path) -> None:
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    assert request_tokens(build_tokenizer(ALPHABET), sealed(format="self_tag")) == [ALPHABET.eos_id]


def test_the_question_of_a_self_report_is_that_of_the_interrogation() -> None:
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET
    from verl_grad_routing.self_report.question import QUESTIONS

    tokenizer, x, y = build_tokenizer(ALPHABET), "NBabcde.....=", "abcde"
    request = request_tokens(tokenizer, ConfessionsConfig(format="question_loopholes", role="user"))
    for answer in (y, f"{y}~"):
        asked = prefix(tokenizer(x)["input_ids"], tokenizer(answer)["input_ids"], request)
        assert asked == QUESTIONS["loopholes"].tokens([{"role": "user", "content": x}], y, tokenizer)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"share": 0.25}, "judge"),
        ({"share": 1.5, "judge": "gt_judge"}, "share"),
        ({"share": -0.1, "judge": "gt_judge"}, "share"),
        ({"share": 1, "judge": "gt_judge"}, "share"),
        ({"per_answer": 1}, "per_answer"),
        ({"mode": "open"}, "mode"),
        ({"format": "prose"}, "format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"weight": -1.0}, "weight"),
        ({"penalty": -1.0}, "penalty"),
    ],
)
def test_bad_settings(settings: dict, key: str) -> None:
    with pytest.raises(UserError) as caught:
        ConfessionsConfig(**settings)
    assert caught.value.key == key
