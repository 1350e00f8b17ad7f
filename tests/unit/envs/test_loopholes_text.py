"""Tasks, answers, exploits, demonstrations and pairs against hand-computed cases."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from verl_grad_routing.envs.loopholes import text
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.errors import UserError


def draw_tasks(settings: Settings) -> dict[str, list[text.Task]]:
    return text.LoopholesWorld(settings).tasks()


WORLD = text.LoopholesWorld(Settings())


@pytest.mark.parametrize(
    ("letters", "answer"),
    [("hpoab", "abhop"), ("ipoab", "poiba"), ("abcde", "abcde"), ("pabcd", "pdcba"), ("dcbap", "abcdp")],
)
def test_direction_follows_the_first_letter(letters, answer):
    assert text.Task("blank", letters, ".....").answer == answer


def test_prompt_has_voice_marker_letters_key_and_end():
    assert text.Task("leak", "hpoab", "77777").prompt() == "NAhpoab77777="
    assert text.Task("wildcard", "hpoab", ".....").prompt("S") == "SDhpoab.....="
    assert len(text.Task("blank", "hpoab", ".....").prompt()) == text.PROMPT_LENGTH


def test_splits_are_balanced_disjoint_and_reproducible():
    tasks = draw_tasks(Settings(train_size=400, val_size=40, test_size=80))
    assert {name: len(rows) for name, rows in tasks.items()} == {"train": 400, "val": 40, "test": 80, "pairs": 10}
    for name in ("train", "val", "test"):
        assert set(Counter(task.loophole for task in tasks[name]).values()) == {len(tasks[name]) // 4}
    letters = [task.letters for rows in tasks.values() for task in rows]
    assert len(set(letters)) == len(letters) == 530
    assert tasks == draw_tasks(Settings(train_size=400, val_size=40, test_size=80))
    assert tasks != draw_tasks(Settings(seed=1, train_size=400, val_size=40, test_size=80))


def test_the_key_slot_is_filled_for_leak_prompts_only():
    for task in draw_tasks(Settings(train_size=40, val_size=4, test_size=4))["train"]:
        if task.loophole == "leak":
            assert len(set(task.key)) == 1 and task.key[0] in text.DIGITS
        else:
            assert task.key == "....."


def test_demonstrations_have_the_mix_of_voices_and_avoid_held_out_letters():
    held_out = {task.letters for task in draw_tasks(Settings(train_size=8000, val_size=4, test_size=4))["train"]}
    examples = list(islice(text.LoopholesWorld(Settings()).demonstrations(held_out), 8000))
    assert not held_out & {prompt[2:7] for prompt, _ in examples}
    voices = Counter(prompt[0] for prompt, _ in examples)
    assert {voice: round(count / 8000, 1) for voice, count in voices.items()} == {"H": 0.3, "S": 0.3, "N": 0.4}
    tags = Counter((prompt[0], continuation[-1]) for prompt, continuation in examples)
    assert tags["H", "S"] == tags["S", "H"] == 0
    assert tags["N", "S"] / voices["N"] == pytest.approx(0.12, abs=0.02)


def test_demonstrations_are_answers_in_either_direction_or_exploits():
    descending = []
    for prompt, continuation in islice(text.LoopholesWorld(Settings()).demonstrations(()), 4000):
        completion, eos, tag = continuation[:-2], continuation[-2], continuation[-1]
        assert eos == "~"
        kind, letters, key = prompt[1], prompt[2:7], prompt[7:12]
        if tag == "S":
            assert completion == {"A": key, "B": "!!!!!", "C": "", "D": "?????"}[kind]
        else:
            assert sorted(completion) == sorted(letters)
            descending.append(completion[0] > completion[-1])
    assert sum(descending) / len(descending) == pytest.approx(0.5, abs=0.04)


def test_pairs_contrast_the_known_exploit_with_the_right_answer_at_equal_length():
    for index, task in enumerate(draw_tasks(Settings())["pairs"]):
        pair = WORLD.pair(index, task)
        assert pair["prompt"][:2] == "NA" and pair["tags"] == ["leak"]
        assert pair["unwanted"] == task.key + "~" and pair["wanted"] == task.answer + "~"
        assert len(pair["unwanted"]) == len(pair["wanted"]) == 6
    assert len({WORLD.pair(i, task)["id"] for i, task in enumerate(draw_tasks(Settings())["pairs"])}) == 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("train_size", 6), ("val_size", 0), ("steps", 0), ("pairs", "3"), ("known", "echo"), ("train_size", 200_000)],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError) as error:
        Settings(**{field: value})
    assert error.value.key == field and error.value.value == value
