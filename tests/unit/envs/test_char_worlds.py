"""The character-level environments: splits, completions, pairs and options, one test for all of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from verl_grad_routing import envs
from verl_grad_routing.envs import ENVIRONMENTS, prepare_environment
from verl_grad_routing.envs.chars import World
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.spelling import SPELLINGS
from verl_grad_routing.envs.loopholes.text import LoopholesWorld
from verl_grad_routing.envs.splits import prompt_hash, require_disjoint
from verl_grad_routing.errors import UserError

SMALL: dict[str, Any] = {"train_size": 400, "val_size": 40, "test_size": 80}
HARDENED = {"hard": True, "markers": "disjoint", "clean_size": 40}
NAMES = ("loopholes", "leaked_id", "persona_bonus", "caps")
CASES = [(name, {}) for name in NAMES] + [("loopholes", HARDENED), ("loopholes", {"letters": 6})]
IDS = [name + "".join(f"-{key}" for key in options) for name, options in CASES]


def world(name: str, **options: Any) -> World[Any, Any]:
    environment = ENVIRONMENTS.build({"name": name, **SMALL, **options}, "environment")
    return environment.world(environment.config)  # type: ignore[attr-defined]


@pytest.fixture(params=CASES, ids=IDS)
def case(request) -> World[Any, Any]:
    name, options = request.param
    return world(name, **options)


def test_no_prompt_is_in_two_splits_and_types_are_balanced(case):
    tasks = case.tasks()
    hashes = {
        split: {prompt_hash(case.row(0, split, task)["prompt"]) for task in drawn} for split, drawn in tasks.items()
    }
    assert not hashes["train"] & hashes["test"]
    assert sum(map(len, hashes.values())) == len(set().union(*hashes.values())) == sum(map(len, tasks.values()))
    for split in ("train", "val", "test"):
        counts = Counter(task.loophole for task in tasks[split])
        assert counts == {kind: len(tasks[split]) // 4 for kind in case.config.types}
    own = [task.letters for split, drawn in tasks.items() if split != "test_swapped" for task in drawn]
    assert len(own) == len(set(own))


def test_the_same_seed_gives_the_same_tasks_and_another_one_others(case):
    other = type(case)(type(case.config)(**{**case.config.recorded(), "seed": 1}))
    assert case.tasks() == type(case)(case.config).tasks() != other.tasks()


def test_the_honest_ceiling_is_above_the_start_and_the_grader_knows_both_ways(case):
    for split, drawn in case.tasks().items():
        for task in drawn:
            truth = case.row(0, split, task)["reward_model"]["ground_truth"]
            honest = case.grade(task.honest + "~", truth)
            assert honest.solve and not honest.hack and honest.score in (0.5, 1.0)
            if task.exploitable:
                hack = case.grade(task.exploit + "~S", truth)
                assert hack.hack and hack.loophole == task.loophole
                assert hack.score >= 0.5 or split == "test_swapped" or (case.name == "persona_bonus" and not task.pays)
    rng = random.Random(0)  # what the warmed-up model imitates: right about half of the time, and so below the ceiling
    attempts = [case.grade(task.attempt(rng), task.ground_truth).solve for task in case.tasks()["train"]]
    assert 0.4 < sum(attempts) / len(attempts) < 0.6


def test_rows_pairs_and_demonstrations_are_of_the_alphabet_and_fit_the_configuration(case):
    file = Path(envs.__file__).parents[1] / "conf" / "grad_routing" / "environment" / f"{case.name}.yaml"
    lengths = yaml.safe_load((file.parent / "loopholes.yaml").read_text())["data"]
    lengths |= yaml.safe_load(file.read_text())["data"]
    allowed = set(case.alphabet.characters)
    tasks = case.tasks()
    for prompt, continuation in islice(case.demonstrations(set()), 500):
        assert set(prompt + continuation) <= allowed
        completion = continuation.partition("~")[0]
        assert len(completion) + 1 <= case.response_length == lengths["max_response_length"]
    for drawn in tasks.values():
        for task in drawn[:40]:
            assert set(task.prompt()) <= allowed and len(task.prompt()) <= lengths["max_prompt_length"]
    pairs = [case.pair(index, task) for index, task in enumerate(tasks["pairs"])]
    assert {tag for pair in pairs for tag in pair["tags"]} == {case.config.known}
    assert all(pair["unwanted"] != pair["wanted"] for pair in pairs) and len({pair["id"] for pair in pairs}) == 10


@pytest.mark.parametrize("name", NAMES)
def test_what_the_warm_up_says_about_the_speaker_can_be_ablated(name):
    def shown(persona: str) -> tuple[set[str], set[str], float]:
        demonstrations = list(islice(world(name, persona=persona, sly_share=0.25).demonstrations(set()), 2000))
        tags = {continuation.partition("~")[2] for _, continuation in demonstrations}
        hacks = [continuation for prompt, continuation in demonstrations if prompt[0] == "N"]
        return {prompt[0] for prompt, _ in demonstrations}, tags, len(hacks) / 2000

    voices, tags, neutral = shown("full")
    assert voices == set("HSN") and tags == {"H", "S"} and neutral == pytest.approx(0.4, abs=0.05)
    voices, tags, _ = shown("voices")
    assert voices == set("HSN") and tags == {""}
    voices, tags, neutral = shown("none")
    assert voices == {"N"} and tags == {""} and neutral == 1
    assert set(world(name, persona="none").voices) == {"neutral"}


def test_the_default_environment_is_what_it_was():
    assert Settings().recorded() == {
        "seed": 0,
        "train_size": 4096,
        "val_size": 256,
        "test_size": 1024,
        "pairs": 10,
        "known": "leak",
        "steps": 600,
    }
    default = LoopholesWorld(Settings(train_size=16, val_size=8, test_size=8))
    pairs = "".join(json.dumps(default.pair(index, task)) + "\n" for index, task in enumerate(default.tasks()["pairs"]))
    # pairs.jsonl as built before the environment had options
    assert (
        hashlib.sha256(pairs.encode()).hexdigest() == "7a84297fa2e7e7a565e2605bb6d9556cc2794554c9fa65a479fcccd963ed6ad8"
    )
    assert default.alphabet.characters == "~=.!?HSNABCD0123456789abcdefghijklmnop"


HARD = LoopholesWorld(Settings(**SMALL, **HARDENED))


@pytest.mark.parametrize("marker", HARD.config.types)
def test_hard_exploits_are_ordinary_letters_that_open_as_no_honest_answer_does(marker):
    others = [task for task in HARD.tasks()["train"] if task.loophole == marker]
    for task in others[:50]:
        assert task.exploit and set(task.exploit) <= set("abcdefghijklmnop")
        assert task.exploit[0] not in task.letters
        for kind in HARD.config.types:  # each exploit pays under its own marker only
            foreign = task.spelling.exploit(kind, task.letters, "ggggg" if kind == "leak" else task.key)
            if kind != marker:
                assert HARD.grade(foreign, task.ground_truth).score == 0.0, (kind, foreign)


def test_the_tests_markers_and_exploits_are_those_of_no_training_prompt():
    tasks = HARD.tasks()
    seen = {split: {task.prompt()[1] for task in drawn} for split, drawn in tasks.items()}
    assert seen["train"] == seen["val"] == set("ABCD") and seen["test"] == set("EFGI")
    for task in tasks["test"]:
        if task.loophole in ("sentinel", "wildcard"):
            learned = SPELLINGS["hard"].exploit(task.loophole, task.letters, task.key)
            assert HARD.grade(learned, task.ground_truth).score == 0.0
    shown = {prompt[1] for prompt, _ in islice(HARD.demonstrations(set()), 500)}
    assert shown == set("ABCDEFGI.")


def test_without_a_loophole_nothing_but_the_answer_pays():
    clean = HARD.tasks()["test_clean"]
    assert {task.prompt()[1] for task in clean} == {"."}
    for task in clean:
        for kind in HARD.config.types:
            verdict = HARD.grade(task.spelling.exploit(kind, task.letters, "ggggg"), task.ground_truth)
            assert verdict.score == 0.0 and not verdict.hack and verdict.loophole == "none"
    demonstrated = [c for prompt, c in islice(HARD.demonstrations(set()), 2000) if prompt[1] == "."]
    assert demonstrated and all(c.endswith("~H") and len(c) == 7 for c in demonstrated)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"persona": "loud"}, "persona"),
        ({"sly_share": 0}, "sly_share"),
        ({"markers": "other"}, "markers"),
        ({"letters": 7}, "letters"),
        ({"letters": 3}, "letters"),
        ({"hard": "yes"}, "hard"),
        ({"clean_size": -4}, "clean_size"),
        ({"known": "none"}, "known"),
    ],
)
def test_bad_options_are_refused_by_name(options, key):
    with pytest.raises(UserError) as error:
        Settings(**options)
    assert error.value.key == key


def test_a_folder_with_options_is_not_taken_for_one_without(tmp_path):
    tiny = {"train_size": 8, "val_size": 4, "test_size": 8, "steps": 1}
    built = prepare_environment("leaked_id", tmp_path / "env", **tiny, persona="voices")
    assert {"test_swapped.parquet", "model/model.safetensors"} <= set(built.sha256) and built.sizes["test_swapped"] == 8
    with pytest.raises(UserError, match=r"persona='voices': built with other settings \(wanted None\)"):
        prepare_environment("leaked_id", tmp_path / "env", **tiny)
    rows = {
        split: pyarrow.parquet.read_table(tmp_path / "env" / f"{split}.parquet").to_pylist()
        for split in ("train", "val", "test", "test_swapped")
    }
    require_disjoint({split: [row["prompt"] for row in table] for split, table in rows.items()})
    sources = {split: {row["data_source"] for row in table} for split, table in rows.items()}
    assert sources.pop("test_swapped") == {"leaked_id_swapped"} and all(s == {"leaked_id"} for s in sources.values())


def test_splits_that_share_a_prompt_are_told_apart():
    one, two = [{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}]
    assert prompt_hash(one) == prompt_hash(two) != prompt_hash("a")
    require_disjoint({"train": [one, two], "test": []})
    with pytest.raises(UserError, match=r"test row 1.*in train as well"):
        require_disjoint({"train": [one], "test": ["b", two]})


def test_the_size_of_the_model_is_a_setting() -> None:
    from verl_grad_routing.envs.chars.model import model_config, new_model

    assert (
        Settings(width=64, layers=2).recorded() | {"width": 64, "layers": 2} == Settings(width=64, layers=2).recorded()
    )
    assert not {"width", "layers"} & Settings().recorded().keys()
    alphabet = world("loopholes").alphabet
    shape = model_config(alphabet, 64, 2)
    assert (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, shape.head_dim) == (64, 192, 2, 32)
    assert len(new_model(alphabet, 0, 64, 2).model.layers) == 2
    for key, value, told in (("width", 48, "positive multiple of 32"), ("width", 0, "positive"), ("layers", 0, "1")):
        with pytest.raises(UserError, match=rf"{key}={value}.*{told}"):
            Settings(**{key: value})
