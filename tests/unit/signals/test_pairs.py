"""Contrastive pair files: both formats, selection, hash, and every refusal."""

import json

import pytest

from verl_grad_routing.directions import load_pairs, require_hash, split_held_out
from verl_grad_routing.errors import UserError

MARKDOWN = """# Title

Prose, with a fence that is not a pair:
```
## not a section
### not a pair
```

## honesty
Prose about the section.
### desk
Tags: home, short
#### Prompt
```
Is the desk tidy?
```
#### Unwanted
````text
```
Yes!
```
````
#### Wanted
```
No,
two cups.
```

### code
#### Prompt
`````
Run it.
`````
#### Wanted
```
It failed.
```
#### Unwanted
```
All passed.
```
## other
### desk
#### Prompt
```
a
```
#### Unwanted
```
b
```
#### Wanted
```
c
```
### two
#### Prompt
```
a
```
#### Unwanted
```
d
```
#### Wanted
```
e
```
"""
RECORDS = [
    {"id": "desk", "prompt": "Is the desk tidy?", "unwanted": "```\nYes!\n```", "wanted": "No,\ntwo cups."},
    {"id": "code", "prompt": "Run it.", "unwanted": "All passed.", "wanted": "It failed.", "tags": ["work"]},
]


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return str(path)


def refusal(selector):
    with pytest.raises(UserError) as caught:
        load_pairs(selector)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_markdown_content(tmp_path):
    (tmp_path / "p.md").write_text(MARKDOWN)
    pairs = load_pairs(f"{tmp_path}/p.md#honesty")
    assert [pair.id for pair in pairs] == ["desk", "code"]
    assert pairs[0].prompt == "Is the desk tidy?" and pairs[0].chat is None
    assert pairs[0].unwanted == "```\nYes!\n```"
    assert pairs[0].wanted == "No,\ntwo cups."
    assert pairs[0].tags == ("home", "short")
    assert pairs[1].unwanted == "All passed." and pairs[1].tags == ()


def test_hash_is_of_the_selected_content_alone(tmp_path):
    path = tmp_path / "p.md"
    path.write_text(MARKDOWN)
    before = load_pairs(f"{path}#honesty").content_hash
    assert load_pairs(write(tmp_path / "p.jsonl", RECORDS)).content_hash == before  # format and tags do not matter
    path.write_text(MARKDOWN.replace("e\n```", "E\n```"))  # other section
    assert load_pairs(f"{path}#honesty").content_hash == before
    path.write_text(MARKDOWN.replace("It failed.", "It  failed."))
    changed = load_pairs(f"{path}#honesty")
    assert changed.content_hash != before
    with pytest.raises(UserError) as caught:
        require_hash(changed, before)
    assert before[:12] in str(caught.value) and changed.content_hash[:12] in str(caught.value)
    require_hash(changed, changed.content_hash)
    reordered = load_pairs(write(tmp_path / "q.jsonl", RECORDS[::-1]))
    assert reordered.content_hash != before


def test_jsonl_chat_prompts_and_tags(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    records = [
        {"id": str(i), "prompt": chat, "unwanted": f"u{i}", "wanted": f"w{i}", "tags": tags}
        for i, tags in enumerate((["x"], ["y"], ["x", "y"], []))
    ]
    path = write(tmp_path / "a@b#c.jsonl", [records[0], "", *records[1:]])
    assert load_pairs(path)[0].chat == chat
    assert len(load_pairs(path)) == 4
    assert [pair.id for pair in load_pairs(path + "@x")] == ["0", "2"]
    assert [pair.id for pair in load_pairs(path + "@x,y")] == ["0", "1", "2"]
    assert "'z'" in refusal(path + "@x,z")


PAIR = RECORDS[1]
BAD_JSONL = {
    "bad JSON": (["{"], ":2"),
    "not an object": (["[1]"], ":2"),
    "missing field": ([{k: v for k, v in PAIR.items() if k != "wanted"}], "missing"),
    "extra field": ([{**PAIR, "wantd": "x"}], "wantd"),
    "duplicate id": ([PAIR], "taken"),
    "equal sides": ([{**PAIR, "id": "z", "wanted": PAIR["unwanted"]}], "equal"),
    "empty side": ([{**PAIR, "id": "z", "unwanted": " \n"}], "not empty"),
    "number as id": ([{**PAIR, "id": 3}], "not empty"),
    "empty prompt": ([{**PAIR, "id": "z", "prompt": ""}], "prompt"),
    "empty chat": ([{**PAIR, "id": "z", "prompt": []}], "prompt"),
    "bad message": ([{**PAIR, "id": "z", "prompt": [{"role": "user"}]}], "role"),
    "bad tags": ([{**PAIR, "id": "z", "tags": "x"}], "tags"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, case):
    lines, hint = BAD_JSONL[case]
    message = refusal(write(tmp_path / "p.jsonl", [PAIR, *lines]))
    assert hint in message and "p.jsonl:2" in message


def test_bad_selection_is_refused(tmp_path):
    markdown = tmp_path / "p.md"
    markdown.write_text(MARKDOWN)
    jsonl = write(tmp_path / "p.jsonl", RECORDS)
    assert "no such file" in refusal(f"{tmp_path}/absent.jsonl")
    assert "empty" in refusal(write(tmp_path / "empty.jsonl", [""]))
    assert "at least 2" in refusal(write(tmp_path / "one.jsonl", RECORDS[:1]))
    assert "at least 2" in refusal(jsonl + "@work")
    assert "sections" in refusal(jsonl + "#honesty")
    assert "did you mean 'honesty'" in refusal(f"{markdown}#honest")
    assert "honesty, other" in refusal(str(markdown))
    assert "path.jsonl" in refusal("pairs.txt")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "é"}'.encode("latin-1"))
    assert "UTF-8" in refusal(str(latin))


def pair_block(body):
    return f"## s\n### one\n{body}"


FENCED = "#### Prompt\n```\np\n```\n#### Unwanted\n```\nu\n```\n#### Wanted\n```\nw\n```\n"
BAD_MARKDOWN = {
    "open fence": (pair_block("#### Prompt\n````\nx\n```\n"), ":4", "close"),
    "stray text": (pair_block("hello\n" + FENCED), ":3", "no more"),
    "stray text in a field": (pair_block("#### Prompt\nhello\n"), ":4", "fenced"),
    "stray fence": (pair_block(FENCED + "```\nx\n```\n"), ":15", "no more"),
    "field without block": (pair_block("#### Prompt\n#### Wanted\n"), ":4", "fenced"),
    "block missing at the end": (pair_block("#### Prompt\n"), "prompt", "ends"),
    "unknown field": (pair_block("#### Clean\n```\nx\n```\n"), ":3", "known"),
    "repeated field": (pair_block(FENCED + "#### Prompt\n```\nx\n```\n"), ":15", "already"),
    "missing field": (pair_block("#### Prompt\n```\np\n```\n"), ":2", "missing"),
    "late tags": (pair_block(FENCED + "Tags: x\n"), ":15", "no more"),
    "pair outside a section": ("### one\n" + FENCED, ":1", "section"),
    "field outside a pair": ("## s\n" + FENCED, ":2", "under a pair"),
    "section twice": (pair_block(FENCED) + "## s\n", ":15", "own name"),
    "section without pairs": ("## s\ntext\n", "#s", "no pairs"),
    "no sections": ("text\n", "p.md", "no sections"),
    "duplicate id": (pair_block(FENCED) + "### one\n" + FENCED, ":15", "taken"),
    "empty side": (pair_block(FENCED.replace("u\n", "\n", 1)), ":2", "not empty"),
}


@pytest.mark.parametrize("case", BAD_MARKDOWN)
def test_bad_markdown_is_refused_with_its_line(tmp_path, case):
    text, place, hint = BAD_MARKDOWN[case]
    (tmp_path / "p.md").write_text(text)
    message = refusal(f"{tmp_path}/p.md#s")
    assert place in message and hint in message


def test_split_is_deterministic_disjoint_and_never_empty():
    assert split_held_out(10, 0.2, 0) == split_held_out(10, 0.2, 0)
    assert len({split_held_out(10, 0.2, seed) for seed in range(10)}) > 5
    for pairs, fraction, count in ((10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (40, 0.25, 10)):
        fitted, held_out = split_held_out(pairs, fraction, 3)
        assert len(held_out) == count and sorted(fitted + held_out) == list(range(pairs))
    for pairs, fraction in ((1, 0.5), (5, 0.0), (5, 1.0)):
        with pytest.raises(UserError):
            split_held_out(pairs, fraction, 0)
