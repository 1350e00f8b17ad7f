"""Preparing the folder, the user's own problem files, and what is refused."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_module

from verl_grad_routing.directions.pairs import load_pairs
from verl_grad_routing.envs import prepare_environment
from verl_grad_routing.envs.code_loopholes import leetcode, prepare
from verl_grad_routing.envs.code_loopholes.channels import LOOPHOLES
from verl_grad_routing.envs.code_loopholes.problem import shipped
from verl_grad_routing.errors import UserError

RECORD = {
    "id": 7,
    "difficulty": "hard",
    "question": "Return the sum of both numbers.\n```python\nclass Solution:\n    def add(self, a, b):\n```\nSOLUTION:",
    "gt_answer": [f"assert Solution().add(a = {a}, b = {a * a}) == {a + a * a}" for a in range(5)],
    "func_name": "Solution().add",
    "setup_code": "import math",
    "canonical_solution": "class Solution:\n    def add(self, a, b):\n        return math.floor(a + b)\n",
    "dataset": "ignored",
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "code"
    return folder, prepare_environment("code_loopholes", folder)


def test_splits_share_no_problem_and_no_prompt(built):
    folder, manifest = built
    assert manifest.sizes == {"train": 288, "val": 48, "test": 96, "test_clean": 12, "pairs": 12}
    problems, prompts = [], []
    for split in ("train", "val", "test", "test_clean"):
        rows = pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()
        assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
        assert {row["data_source"] for row in rows} == {"code_loopholes"}
        prompts += [row["prompt"][0]["content"] for row in rows]
        if split != "test_clean":
            problems.append({row["extra_info"]["problem"] for row in rows})
            assert len(rows) == len(problems[-1]) * len(LOOPHOLES)
        else:
            assert {row["extra_info"]["problem"] for row in rows} == problems[-1]
    problems.append({pair["id"].split("-")[1] for pair in map(json.loads, (folder / "pairs.jsonl").open())})
    assert sum(map(len, problems)) == len(set().union(*problems)) == len(shipped())
    assert len(set(prompts)) == len(prompts)


def test_the_pairs_load_and_show_known_types_only(built):
    pairs = load_pairs(str(built[0] / "pairs.jsonl"))
    assert len(pairs) == 12 and {pair.tags[0] for pair in pairs} == {"run_tests", "sentinel", "stdout"}
    for pair in pairs:
        assert pair.unwanted.split("\n")[0] == pair.wanted.split("\n")[0]  # alike but for the program


def test_the_same_settings_give_the_same_bytes_and_are_reused(built, tmp_path, capsys):
    assert prepare_environment("code_loopholes", tmp_path / "again").sha256 == built[1].sha256
    assert "actor_rollout_ref.model.path" in capsys.readouterr().err
    assert prepare_environment("code_loopholes", built[0]) == built[1]
    assert capsys.readouterr().err == ""
    other = prepare_environment("code_loopholes", tmp_path / "other", seed=1)
    assert other.sha256["train.parquet"] != built[1].sha256["train.parquet"]


def test_problems_of_the_users_own(tmp_path):
    records = [{**RECORD, "id": index, "question": f"Add up ({index}).\n```python\n```"} for index in range(7)]
    file = write(tmp_path / "own.jsonl", *records[:6])
    options = {"problems": file, "pairs": 2, "val_problems": 1, "test_problems": 1}
    manifest = prepare_environment("code_loopholes", tmp_path / "env", **options)
    assert manifest.sizes == {"train": 16, "val": 8, "test": 8, "test_clean": 1, "pairs": 2}
    write(tmp_path / "own.jsonl", *records[1:])
    with pytest.raises(UserError, match="problems_sha256"):
        prepare_environment("code_loopholes", tmp_path / "env", **options)


def test_one_question_under_two_ids_is_refused_with_both_lines(tmp_path):
    file = write(tmp_path / "own.jsonl", RECORD, {**RECORD, "id": 8})
    with pytest.raises(UserError, match=r"own\.jsonl:2 question='Return the sum.*': line 1 asks the same"):
        leetcode.read(file)


def test_splits_that_share_a_prompt_are_refused(tmp_path, monkeypatch):
    problem, names = shipped()[0], ("train", "val", "test", "pairs")
    monkeypatch.setattr(prepare, "divide", lambda *_: {name: [problem] for name in names})
    with pytest.raises(UserError, match=r"val row \d+=.*this prompt is in train as well"):
        prepare_environment("code_loopholes", tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_a_problem_is_read_as_written(tmp_path):
    (problem,) = leetcode.read(write(tmp_path / "own.jsonl", {**RECORD, "func_name": "Solution.add"}))
    assert (problem.id, problem.entry, problem.difficulty) == ("7", "Solution().add", "hard")
    assert [call.kwargs for call in problem.examples] == [{"a": 0, "b": 0}, {"a": 1, "b": 1}]
    assert [call.value for call in problem.tests] == [6, 12, 20]


def test_a_wrong_canonical_solution_is_refused(tmp_path):
    wrong = {**RECORD, "gt_answer": [*RECORD["gt_answer"][:4], "assert Solution().add(1, 1) == 3"]}
    file = write(tmp_path / "own.jsonl", wrong)
    with pytest.raises(UserError, match=r"id=7 canonical_solution.*gt_answer\[4\]"):
        prepare_environment("code_loopholes", tmp_path / "env", problems=file)
    assert not (tmp_path / "env").exists()


BAD = [
    ({"question": None}, "question"),
    ({"question": "  "}, "question"),
    ({"id": 1.5}, " id"),
    ({"func_name": "a.b.c"}, "func_name"),
    ({"gt_answer": ["assert Solution().add(1, 1) == 2"]}, "gt_answer"),
    ({"gt_answer": "assert Solution().add(1, 1) == 2"}, "gt_answer"),
    ({"gt_answer": ["assert Solution().add(1, 1) == 2"] * 3 + ["assert Solution().mul(1, 1) == 2"]}, r"gt_answer\[3\]"),
    ({"gt_answer": ["assert Solution().add(1, 1) == 2"] * 3 + ["assert Solution().add(1, 1)"]}, r"gt_answer\[3\]"),
    ({"gt_answer": ["assert Solution().add(node([1])) == 2"] * 3}, r"gt_answer\[0\]"),
    ({"gt_answer": ["assert Solution().add(1, 1) == (2, 3)"] * 3}, r"gt_answer\[0\]"),
    ({"gt_answer": ["assert Solution().add(1, 1) == {1: 2}"] * 3}, r"gt_answer\[0\]"),
    ({"setup_code": 3}, "setup_code"),
]


@pytest.mark.parametrize(("change", "field"), BAD)
def test_a_bad_line_is_refused_with_its_number_and_field(tmp_path, change, field):
    file = write(tmp_path / "own.jsonl", {**RECORD, "id": "first"}, {**RECORD, **change})
    with pytest.raises(UserError, match=rf"own\.jsonl:2.*{field}") as error:
        leetcode.read(file)
    assert "\n" not in str(error.value)


def test_other_bad_files_are_refused(tmp_path):
    missing = {key: value for key, value in RECORD.items() if key != "func_name"}
    for records, what in (([missing], ":1 func_name"), ([RECORD, RECORD], ":2 id"), ([], "empty"), (["x"], ":1")):
        with pytest.raises(UserError, match=what):
            leetcode.read(write(tmp_path / "own.jsonl", *records))
    with pytest.raises(UserError, match="no such file"):
        prepare_environment("code_loopholes", tmp_path / "env", problems=str(tmp_path / "none.jsonl"))


def test_the_preset_is_complete_but_for_the_model(built):
    import verl  # noqa: F401  (loads the plugin)

    given = ["+grad_routing=persona", "+grad_routing/environment=code_loopholes"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*given, f"grad_routing.environment.dir={built[0]}"])
    assert config.actor_rollout_ref.model.path is None  # refused at the start of a run: "give the model's folder"
    function = config.reward.custom_reward_function
    assert function.path == "pkg://verl_grad_routing.envs.code_loopholes.reward"
    assert config.data.train_files == f"{built[0]}/train.parquet" and (built[0] / "train.parquet").is_file()
    assert config.grad_routing.environment.name == "code_loopholes"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"known": "run_test"}, "did you mean 'run_tests'"),
        ({"known": ",".join(LOOPHOLES)}, "unknown"),
        ({"known": "stdout,stdout"}, "once"),
        ({"pairs": 1}, "pairs"),
        ({"test_problems": 0}, "test_problems"),
        ({"seed": "a"}, "seed"),
        ({"pairs": 60}, "66"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, field):
    with pytest.raises(UserError, match=field):
        prepare_environment("code_loopholes", tmp_path / "env", **options)
