"""The command ``vgr``: what it prints, how it exits, and what it leaves unimported."""

from __future__ import annotations

import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from verl_grad_routing import cli
from verl_grad_routing.doctor import Check, Status
from verl_grad_routing.errors import UserError

PRESETS = {"off", "vanilla_2r", "absorb", "persona", "random", "coinflip", "oracle"}
PRESETS |= {"tdga", "gradient_regularization", "confessions", "seal_broken"}
PRESETS |= {"labels_partial", "strict", "head_start", "head_start_freeze", "pissa", "antipasto", "retain_pass"}
PRESETS |= {"corda", "scorda", "scorda_rev", "persona_grad", "random_grad"}
PRESETS |= {"advantage_modification", "grift_mask", "grift_filter", "monitor_penalty", "screen", "inoculation"}
PRESETS |= {"self_report", "era", "persona_token"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``vgr`` with these arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    written = capsys.readouterr()
    code = stop.value.code
    return (0 if code is None else int(code)), written.out, written.err


def one_line(text: str) -> str:
    """The only line of ``text``."""
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text.strip()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    commands = ("doctor", "list", "prepare", "export", "bench", "demo", "compare", "report", "warm-up", "drift")
    for command in (
        *commands,
        "contrast",
        "expand",
        "pairs",
        "retain",
        "rft",
        "probe",
        "self-report",
        "interrogate",
        "scorecard",
    ):
        assert command in out
    assert all(command in out for command in ("probe", "self-report", "interrogate"))
    status, out, _ = run(capsys, "bench", "--help")
    assert status == 0 and "kernel" in out and "step" in out and "grader" in out and "baselines" in out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from verl_grad_routing.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'verl', 'ray', 'vllm', 'hydra') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("presets", PRESETS),
        (
            "detectors",
            {"persona_act", "random", "coinflip", "constant", "labels", "oracle", "persona_grad", "classifier"},
        ),
        ("gates", {"history_quantile", "pair_band", "otsu", "exponential_quantile", "hysteresis"}),
        ("interventions", {"route"}),
        ("bases", {"random_orthogonal", "pissa_split", "corda", "scorda", "scorda_rev"}),
        ("forms", {"lora", "two_sided", "antipasto", "antipasto_lineage"}),
        ("environments", {"loopholes", "code_loopholes"}),
    ],
)
def test_list_names_and_describes(capsys: pytest.CaptureFixture[str], kind: str, expected: set[str]) -> None:
    status, out, _ = run(capsys, "list", kind)
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert expected <= set(rows)
    assert list(rows) == sorted(rows)
    assert not any(name.startswith("_") for name in rows)


def test_list_tells_the_signal_of_a_detector(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "list", "detectors")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["oracle"].split()[0] == "oracle"
    assert rows["persona_act"].split()[0] == "pairs"


def test_presets_take_their_description_from_the_first_comment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conf" / "grad_routing"
    folder.mkdir(parents=True)
    (folder / "b.yaml").write_text("# @package _global_\n# Routes nothing.\nkey: 1  # not this\n")
    (folder / "a.yaml").write_text("key: 1\n")
    (folder / "_base.yaml").write_text("# Hidden.\n")
    monkeypatch.setattr(cli.resources, "files", lambda _: tmp_path)
    status, out, _ = run(capsys, "list", "presets")
    assert (status, out) == (0, "a\nb  Routes nothing.\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "loophole", "--to", "x"], ["'loophole'", "loopholes"]),
        (["export", "nowhere", "--to", "x"], ["CHECKPOINT", "'nowhere'"]),
        (["expand", "nowhere", "--to", "x"], ["MODEL", "'nowhere'", "no config.json"]),
        (["expand", "nowhere", "--mlp-units", "0", "--to", "x"], ["--mlp-units=0", "at least 1"]),
        (["report", "nowhere"], ["RUNS", "'nowhere'"]),
        (["compare", "nowhere.yaml"], ["GRID", "'nowhere.yaml'", "no such file"]),
        (["probe", "show", "nowhere"], ["PROBE", "'nowhere'", "vgr probe fit"]),
        (["probe", "fit", "nowhere", "x", "--to", "p.txt"], ["--to", "name.safetensors"]),
        (["probe", "fit", "nowhere", "x", "--to", "p.safetensors"], ["MODEL", "'nowhere'", "config.json"]),
        (["interrogate", "nowhere", "x"], ["MODEL", "'nowhere'"]),
        (["self-report", "lessons", "nowhere", "--to", "x"], ["folder", "'nowhere'", "vgr prepare"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    line = one_line(err)
    assert all(word in line for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["list", "nonsense"], ["prepare"], ["export", "x"], ["bench", "kernel", "--x"]])
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "Traceback" not in err


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Put a module with ``content`` where the command will import it from."""
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_arguments_reach_the_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[object] = []

    def record(*values: object, **named: object) -> None:
        calls.append((*values, named))

    ours = "verl_grad_routing"
    fake_module(monkeypatch, f"{ours}.envs", prepare_environment=record)
    fake_module(monkeypatch, f"{ours}.deploy", export=record)
    fake_module(monkeypatch, f"{ours}.bench", kernel=None)
    fake_module(monkeypatch, f"{ours}.bench.kernel", run_kernel_bench=record)
    fake_module(monkeypatch, f"{ours}.bench.step", run_step_bench=record)
    fake_module(monkeypatch, f"{ours}.compare.demo", run_demo=record)
    fake_module(monkeypatch, f"{ours}.compare.report", write_report=record)
    folder = str(tmp_path)
    lines = [
        ["prepare", "e", "--to", "d"],
        ["prepare", "e", "--to", "d", "--seed", "3", "--force"],
        ["export", folder, "--to", "d", "--format", "hf", "--blocks", "both"],
        ["bench", "kernel", "--json", "f", "--device", "cpu", "--repeats", "5"],
        ["bench", "step"],
        ["demo", "--to", "d"],
        ["report", folder, folder, "--to", "d"],
    ]
    assert [run(capsys, *line)[0] for line in lines] == [0] * len(lines)
    defaults = {"base_model": None, "max_difference": None, "run": None, "force": False}
    assert calls == [
        ("e", Path("d"), {"force": False}),
        ("e", Path("d"), {"force": True, "seed": 3}),
        (tmp_path, Path("d"), "hf", "both", defaults),
        ({"json_path": Path("f"), "device": "cpu", "repeats": 5},),
        ({"json_path": None},),
        (Path("d"), {}),
        ([tmp_path, tmp_path], Path("d"), False, {}),
    ]


def test_a_message_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(to: Path) -> None:
        raise UserError("key", "value", "first\n  second")

    fake_module(monkeypatch, "verl_grad_routing.compare.demo", run_demo=fail)
    status, _, err = run(capsys, "demo")
    assert (status, one_line(err)) == (2, "key='value': first second")


def test_a_missing_optional_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs_matplotlib(runs: list[Path], to: Path, allow_mixed_versions: bool) -> None:
        import matplotlib  # noqa: F401

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fake_module(monkeypatch, "verl_grad_routing.compare.report", write_report=needs_matplotlib)
    status, _, err = run(capsys, "report", str(tmp_path))
    assert status == 2
    assert ".[report]" in one_line(err)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(to: Path) -> None:
        raise ZeroDivisionError

    fake_module(monkeypatch, "verl_grad_routing.compare.demo", run_demo=fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((Status.OK, Status.WARN), 0), ((Status.OK, Status.FAIL, Status.OK), 1)],
)
def test_doctor_exits_by_the_worst_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], statuses: tuple[Status, ...], expected: int
) -> None:
    import verl_grad_routing.doctor as doctor

    monkeypatch.setattr(doctor, "run_checks", lambda: (Check("thing", status, "found", "do") for status in statuses))
    status, out, _ = run(capsys, "doctor")
    assert status == expected
    assert out.splitlines() == [f"{status.value:<4}  thing: found: do" for status in statuses]
