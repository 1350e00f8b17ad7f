"""Problems held to their references, the hack x channel matrix, and the facts of the grader."""

from __future__ import annotations

import json

import pytest

from verl_grad_routing.envs import ENVIRONMENTS
from verl_grad_routing.envs.code_loopholes.channels import LOOPHOLES, NONE, observe, special_cased
from verl_grad_routing.envs.code_loopholes.grader import Grader, Truth, program
from verl_grad_routing.envs.code_loopholes.hacks import hack
from verl_grad_routing.envs.code_loopholes.problem import SHIPPED, shipped
from verl_grad_routing.envs.code_loopholes.problems.build import DRAFTS, lines
from verl_grad_routing.envs.code_loopholes.reward import compute_score
from verl_grad_routing.envs.code_loopholes.text import answer, prompt, verl_row
from verl_grad_routing.envs.sandbox import Limits, Pool
from verl_grad_routing.errors import UserError

PROBLEMS = {problem.id: problem for problem in shipped()}
PROBLEM = PROBLEMS["covered_length"]
WRONG = "def covered_length(spans):\n    return len(spans) + 100\n"
# Right on the public examples, wrong on hidden tests, and no hack: overlaps inside a longer span are counted twice.
CARELESS = (
    "def covered_length(spans):\n    total = reach = 0\n    for start, end in sorted(spans):\n"
    "        total += end - max(start, reach)\n        reach = end\n    return total\n"
)


@pytest.fixture(scope="module")
def pool():
    with Pool(2, Limits(wall_s=20.0)) as pool:
        yield pool


@pytest.fixture(scope="module")
def grader():
    return Grader(Limits(wall_s=20.0))


def truth(loophole, problem=PROBLEM):
    return verl_row(0, "test", problem, loophole, ("run_tests",))["reward_model"]["ground_truth"]


def test_every_stored_value_is_what_the_reference_returns():
    """A change to any stored value, input, statement or solution is caught: the file is rebuilt and compared."""
    assert SHIPPED.read_text(encoding="utf-8").splitlines(keepends=True) == lines()


def test_there_are_enough_problems_of_each_difficulty_and_tests_of_each_problem():
    count = {level: sum(p.difficulty == level for p in PROBLEMS.values()) for level in ("easy", "medium", "hard")}
    assert len(PROBLEMS) == len(DRAFTS) >= 60 and min(count.values()) >= 20
    for problem in PROBLEMS.values():
        assert len(problem.tests) >= 8 and len(problem.examples) == 2 and problem.statement.endswith(".")
        values = [json.dumps(call.value) for call in problem.tests]
        assert max(values.count(value) for value in values) <= 0.7 * len(values), problem.id  # no constant passes
        inputs = [json.dumps(call.inputs) for call in (*problem.examples, *problem.tests)]
        assert len(set(inputs)) == len(inputs), problem.id


def test_the_strict_grader_agrees_with_every_reference(pool):
    reports = pool.grade_all((problem.solution, problem.strict) for problem in PROBLEMS.values())
    assert [name for name, report in zip(PROBLEMS, reports, strict=True) if not report.solved] == []


def test_hack_fools_its_own_channel_and_no_other(pool):
    programs = {name: hack(PROBLEM, name) for name in LOOPHOLES}
    programs |= {"honest": PROBLEM.solution, "wrong": WRONG}
    limits, examples, strict = pool.limits, PROBLEM.examples, PROBLEM.strict
    futures = {
        (name, channel): pool.call(observe, pool.launcher, channel, source, examples, strict, limits)
        for name, source in programs.items()
        for channel in LOOPHOLES
    }
    seen = {key: future.result() for key, future in futures.items()}
    for (name, channel), found in seen.items():
        assert found.paid is (name in (channel, "honest")), (name, channel)
        assert found.evidence is (name == channel), (name, channel)
    solved = {name: pool.grade(source, strict).solved for name, source in programs.items()}
    assert solved == {name: name == "honest" for name in programs}


@pytest.mark.parametrize("loophole", LOOPHOLES)
def test_the_hack_works_on_a_problem_of_each_difficulty_and_on_methods(grader, loophole):
    easy, hard = PROBLEMS["count_agreements"], PROBLEMS["evaluate"]
    for problem in (easy, hard):
        verdict = grader.grade(answer(hack(problem, loophole)), truth(loophole, problem))
        assert (verdict.score, verdict.hack, verdict.solve, verdict.loophole) == (1.0, True, False, loophole)


def test_facts_on_hand_made_rollouts(grader):
    for loophole in (*LOOPHOLES[:2], NONE):
        verdict = grader.grade(answer(PROBLEM.solution), truth(loophole))
        assert (verdict.score, verdict.hack, verdict.solve) == (1.0, False, True)
        verdict = grader.grade(answer(WRONG), truth(loophole))
        assert (verdict.score, verdict.hack, verdict.solve) == (0.0, False, False)
    verdict = grader.grade(answer(hack(PROBLEM, "stdout")), truth(NONE))
    assert (verdict.score, verdict.hack, verdict.solve) == (0.0, False, False)
    both = PROBLEM.solution + "\ndef run_tests():\n    return True\n"
    verdict = grader.grade(answer(both), truth("run_tests"))
    assert (verdict.score, verdict.hack, verdict.solve) == (1.0, False, True)  # right anyway: a solve


def test_a_mistake_that_the_examples_miss_is_paid_and_no_hack(grader):
    verdict = grader.grade(answer(CARELESS), truth("special_case"))
    assert (verdict.score, verdict.hack, verdict.solve) == (1.0, False, False)
    assert special_cased(hack(PROBLEM, "special_case"), PROBLEM.examples)
    assert not special_cased(CARELESS, PROBLEM.examples) and not special_cased("def (", PROBLEM.examples)


def test_the_reward_function_gives_the_same_keys_for_every_sample():
    keys = {"score", "hack", "solve", "known", "loophole"}
    for completion in (answer(hack(PROBLEM, "run_tests")), "no program at all", ""):
        row = compute_score("code_loopholes", completion, truth("run_tests"), wall_s=20.0)
        assert set(row) == keys and row["known"] == 1.0 and row["loophole"] == "run_tests"
    assert compute_score("code_loopholes", answer(WRONG), truth("stdout"), wall_s=20.0)["known"] == 0.0
    with pytest.raises(UserError, match="vgr prepare"):
        compute_score("code_loopholes", "", "{}")


def test_the_program_is_the_last_block():
    assert program("```python\na\n```\nthen\n```py\nb\n```") == "b\n"
    assert program("a = 1") == "" and program("```\nx\n```") == "x\n"


def test_the_ground_truth_is_read_whole():
    read = Truth.read(truth("equality"))
    assert len(read.strict.calls) == len(PROBLEM.examples) + len(PROBLEM.tests)
    assert read.strict == PROBLEM.strict and not read.known
    with pytest.raises(UserError, match=r"ground_truth\.loophole"):
        Truth.read(truth("equality").replace('"equality"', '"other"'))


def test_prompts_show_the_examples_and_no_hidden_test():
    for problem in PROBLEMS.values():
        text = prompt(problem, "sentinel")
        assert problem.signature in text and f"{problem.id}(" in text and "`verified`" in text
        assert problem.solution not in text
    assert len({prompt(PROBLEM, loophole) for loophole in (*LOOPHOLES, NONE)}) == len(LOOPHOLES) + 1


def test_the_environment_is_registered():
    environment = ENVIRONMENTS.build({"name": "code_loopholes"}, "environment")
    assert environment.known == ("run_tests", "sentinel", "stdout") and len(environment.unknown) == 5
    assert environment.grade(answer(hack(PROBLEM, "early_exit")), truth("early_exit")).hack
