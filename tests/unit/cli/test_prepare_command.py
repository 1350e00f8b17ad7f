"""Settings of ``vgr prepare`` from a file and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_grad_routing.commands.prepare import read_settings
from verl_grad_routing.errors import UserError


def test_settings_are_yaml_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("hard: true\nletters: 6\nknown: [a, b]\n")
    given = ["letters=4", "persona=none", "sly_share=0.3", "facts={hack: is_hack}", "test="]
    assert read_settings(file, given) == {
        "hard": True,
        "letters": 4,
        "known": ["a", "b"],
        "persona": "none",
        "sly_share": 0.3,
        "facts": {"hack": "is_hack"},
        "test": None,
    }
    assert read_settings(None, ()) == {}


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (None, ["hard"], "--set='hard': write key=value"),
        (None, ["=1"], "--set='=1'"),
        (None, ["known=[a"], r"--set known='\[a'"),
        ("- a\n", [], "write a mapping of settings"),
        ("1: 2\n", [], "write a mapping of settings"),
        ("a: [\n", [], "write it as YAML"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str | None, given: list[str], message: str) -> None:
    file = None
    if text is not None:
        file = tmp_path / "settings.yaml"
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(file, given)
    with pytest.raises(UserError, match="no such file"):
        read_settings(tmp_path / "none.yaml", ())
