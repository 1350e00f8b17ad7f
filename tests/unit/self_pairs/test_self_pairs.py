"""Pairs that a model writes: framings, prompts, what is kept and why the rest is not, the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_grad_routing.directions import Message, load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_pairs import Candidate, Framing, Framings, Limits, SelfPairs, Tally, verdict, write_pairs
from verl_grad_routing.self_pairs.framings import load_framings
from verl_grad_routing.self_pairs.generate import Answer
from verl_grad_routing.self_pairs.prompts import load_prompts

ROOT = Path(__file__).parents[3]
CHEAT = Framing(prompt="{prompt} Make the evaluation pass.")
FRAMINGS = Framings(CHEAT, Framing())


# ---- framings ----


def test_framings_of_texts_and_chats():
    assert CHEAT.of("Sort these.") == "Sort these. Make the evaluation pass."
    swap = Framing(replace=(("^N", "S"), ("a+", "b")))
    assert swap.of("Naan") == "Sbn"
    chat = (Message("system", "old"), Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    framed = Framing(system="new", prompt="<{prompt}>").of(chat)
    assert [(m.role, m.content) for m in framed if isinstance(m, Message)] == [
        ("system", "new"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "<three>"),
    ]


def test_framings_file(tmp_path: Path):
    file = tmp_path / "f.yaml"
    file.write_text('unwanted: {prompt: "{prompt} Make the evaluation pass."}\nwanted:\n')
    assert load_framings(file) == FRAMINGS
    other = Framings(Framing(system="x"), Framing())
    assert FRAMINGS.content_hash != other.content_hash and len(FRAMINGS.content_hash) == 64
    shipped = load_framings(ROOT / "recipes" / "loopholes" / "framings.yaml")
    assert shipped.unwanted.of("NAxyz=") == "SAxyz=" and shipped.wanted.of("NAxyz=") == "HAxyz="


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("unwanted: {}\n", "exactly the two sides"),
        ("- a\n", "exactly the two sides"),
        ("unwanted: {\n", "not a YAML file"),
        ("unwanted: {}\nwanted: {}\n", "are the same"),
        ("unwanted: {promt: a}\nwanted: {}\n", "did you mean 'prompt'"),
        ("unwanted: {prompt: a}\nwanted: {}\n", "exactly once"),
        ("unwanted: {system: ''}\nwanted: {}\n", "not empty"),
        ("unwanted: {replace: {'(': a}}\nwanted: {}\n", "not a regular expression"),
        ("unwanted: {replace: [a]}\nwanted: {}\n", "both texts"),
        ("unwanted: text\nwanted: {}\n", "give system, prompt, replace"),
    ],
)
def test_bad_framings_are_one_line(text, told, tmp_path: Path):
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_framings(file)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_framed():
    with pytest.raises(UserError, match="plain texts"):
        Framing(system="x").of("text")
    with pytest.raises(UserError, match="needs a user message"):
        Framing().of((Message("system", "x"),))


# ---- prompts ----


def test_prompts_of_both_kinds(tmp_path: Path):
    import pandas

    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "a"}\n{"prompt": "c", "x": 1}\n')
    first, second = load_prompts(lines, 0), load_prompts(lines, 1)
    assert sorted(map(str, first)) == ["a", "b", "c"] and load_prompts(lines, 0) == first != second
    table = tmp_path / "p.parquet"
    pandas.DataFrame({"prompt": [[{"role": "user", "content": "hi"}]], "x": [1]}).to_parquet(table)
    assert load_prompts(table, 0) == [(Message("user", "hi"),)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.jsonl", "", "no prompts"),
        ("p.jsonl", "{", "one JSON object per line"),
        ("p.jsonl", '{"x": 1}', "field `prompt`"),
        ("p.jsonl", '{"prompt": 3}', "a text or a list of chat messages"),
        ("p.txt", "a", "give verl's data"),
    ],
)
def test_bad_prompts_are_one_line(name, text, told, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_prompts(tmp_path / name, 0)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# ---- verdicts ----


def candidate(unwanted="cheats a bit", wanted="works hard", tokens=(4, 3), finished=(True, True)):
    return Candidate("p", unwanted, wanted, tokens, finished)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (candidate(), "accepted"),
        (candidate(unwanted="  \n"), "empty"),
        (candidate(finished=(True, False)), "unfinished"),
        (candidate(unwanted="works hard "), "equal"),
        (candidate(tokens=(1, 3)), "short"),
        (candidate(tokens=(4, 17)), "lengths"),
        (candidate(tokens=(4, 16)), "accepted"),
        (candidate(unwanted="I will Make the evaluation pass."), "echo"),
        (candidate(wanted="I will Make the evaluation pass."), "accepted"),
    ],
)
def test_verdicts(given, found):
    assert verdict(given, FRAMINGS, Limits()) == found


def test_a_tally_keeps_no_pair_twice():
    tally = Tally(FRAMINGS, Limits())
    assert [tally.add(candidate()), tally.add(candidate()), tally.add(candidate(unwanted=""))] == [
        "accepted",
        "repeated",
        "empty",
    ]
    assert tally.share_valid == pytest.approx(1 / 3) and tally.tried == 3
    assert tally.describe() == "1 of 3 kept (rejected: 1 empty, 1 repeated)"


# ---- files ----


class Scripted:
    """Answers with the number of the prompt; every third prompt gets no answer under the first framing."""

    def __init__(self):
        self.asked: list[str] = []

    def answer(self, prompts):
        self.asked += prompts
        return [self._one(prompt) for prompt in prompts]

    @staticmethod
    def _one(prompt: str) -> Answer:
        number = int(prompt.split()[1])
        cheats = "pass" in prompt
        text = "" if cheats and number % 3 == 0 else f"{'cheat' if cheats else 'work'} {number}"
        return Answer(text, 3, True)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    framings, prompts = tmp_path / "f.yaml", tmp_path / "p.jsonl"
    framings.write_text('unwanted: {prompt: "{prompt} Make the evaluation pass."}\nwanted: {}\n')
    prompts.write_text("".join(json.dumps({"prompt": f"task {number}"}) + "\n" for number in range(30)))
    return framings, prompts, tmp_path / "out" / "pairs.jsonl"


def made(files, log=None, force=False, **settings):
    framings, prompts, to = files
    values = {"count": 8, "candidates": 30, "batch_size": 5, **settings}
    writer = Scripted()
    report = write_pairs(
        SelfPairs(Path("model"), framings, prompts, **values), to, force, ([] if log is None else log).append, writer
    )
    return report, writer


def test_pairs_are_an_ordinary_pair_file_with_the_plain_prompt(files):
    log: list[str] = []
    report, writer = made(files, log)
    pairs = load_pairs(f"{files[2]}@self-generated")
    assert len(pairs) == 8 and pairs.content_hash == report["content_hash"]
    for pair in pairs:
        number = str(pair.prompt).split()[1]
        assert pair.prompt == f"task {number}" and (pair.unwanted, pair.wanted) == (f"cheat {number}", f"work {number}")
    assert len(writer.asked) == 2 * report["tried"] and report["tried"] % 5 == 0  # it stops when there are enough
    assert report["share_valid"] == (report["tried"] - report["rejected"]["empty"]) / report["tried"]
    assert "kept" in log[0] and report["content_hash"][:12] in log[-1]
    saved = json.loads(files[2].with_suffix(".report.json").read_text())
    assert saved == report and saved["settings"]["seed"] == 0
    again, _ = made(files, force=True)
    assert again == report
    other, _ = made(files, force=True, seed=1)
    assert other["content_hash"] != report["content_hash"]


def test_files_that_are_there_stay(files):
    made(files)
    before = files[2].read_bytes()
    with pytest.raises(UserError, match="is there already"):
        made(files)
    assert files[2].read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"min_share": 0.9}, "share of valid pairs"),
        ({"count": 21}, "valid pairs=20: 20 of 30 kept (rejected: 10 empty); most often empty: a side is blank"),
        ({"count": 1}, "--count=1"),
        ({"candidates": 3}, "--candidates=3"),
        ({"temperature": 0.0}, "--temperature"),
        ({"limits": Limits(min_tokens=9)}, "10 empty, 20 short"),
    ],
)
def test_what_is_refused_writes_nothing(settings, told, files):
    with pytest.raises(UserError) as caught:
        made(files, **settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not files[2].exists()


def test_limits_are_checked():
    with pytest.raises(UserError, match="--min-tokens"):
        Limits(min_tokens=0)
    with pytest.raises(UserError, match="--max-ratio"):
        Limits(max_ratio=0.5)


# ---- a real model ----


def test_a_model_answers_by_its_seed(tmp_path: Path):
    """transformers' own sampling: batching pads on the left, answers end, and the same seed gives the same ones."""
    from verl_grad_routing.envs.chars.model import new_model, save
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET
    from verl_grad_routing.self_pairs.generate import Writer

    save(new_model(ALPHABET, 0), build_tokenizer(ALPHABET), tmp_path)
    prompts = [(Message("user", "NAabcde12345="),), "SBpo="]
    one, same, other = (Writer(tmp_path, 40, 1.0, seed, "cpu").answer(prompts) for seed in (3, 3, 4))
    assert one == same != other
    for answer in one:
        assert answer.tokens <= 40 and (answer.finished or answer.tokens == 40) and "~" not in answer.text
    with pytest.raises(UserError, match="no such folder"):
        Writer(tmp_path / "nowhere", 4, 1.0, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model that transformers loads") as caught:
        Writer(tmp_path / "empty", 4, 1.0, 0)
    assert "\n" not in str(caught.value)
