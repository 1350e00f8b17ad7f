"""What a reader copies from a page is what Hydra takes: every override parses, and none is a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from tests.unit.docs.pages import PAGES, ROOT, Command, commands, inline_overrides
from verl_grad_routing.config import parse
from verl_grad_routing.directions.pairs import GIVE_OVERRIDE

WHOLE = [(page, command) for page in PAGES for command in commands(page.read_text()) if command.whole]


def complaint(override: str) -> str | None:
    """What is wrong with an override on the command line of one run; ``None``: nothing."""
    try:
        found = OverridesParser.create().parse_override(override)
    except HydraException as error:
        return f"{override}: {str(error).splitlines()[0]}"
    return f"{override}: a sweep" if found.is_sweep_override() else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_overrides_of_a_page_parse(page: Path) -> None:
    text = page.read_text()
    given = [override for command in commands(text) for override in command.overrides]
    assert not list(filter(None, map(complaint, [*given, *inline_overrides(text)])))


def test_what_is_refused() -> None:
    """The mistakes that this file is there for, found in a block and in a line of text."""
    text = (
        "Say `grad_routing.seed=0,1,...` or\n\n```bash\npython -m verl.trainer.main_ppo <your overrides> \\\n"
        "    grad_routing.detector.pairs=pairs.md#t \\\n    'grad_routing.detector.pairs=p.jsonl@a,b'  # isn't\n```\n"
    )
    (command,) = commands(text)
    found = [complaint(override) for override in (*command.overrides, *inline_overrides(text))]
    assert [str(one).partition(": ")[2] for one in found] == ["token recognition error at: '#'", "a sweep", "a sweep"]


def test_the_form_that_the_error_suggests_parses() -> None:
    (suggested,) = shlex.split(GIVE_OVERRIDE.partition('"')[1] + GIVE_OVERRIDE.partition('"')[2])
    assert complaint(suggested) is None and complaint(suggested.replace("'", "")) is not None


@pytest.mark.parametrize(("page", "command"), WHOLE, ids=[page.stem for page, _ in WHOLE])
def test_a_whole_command_composes(page: Path, command: Command) -> None:
    folder = command.options.get("--config-path")
    if folder is None:
        where = initialize_config_module("verl.trainer.config", version_base=None)
    else:
        where = initialize_config_dir(folder.replace("$PWD", str(ROOT)), version_base=None)
    with where:
        config = compose(command.options.get("--config-name", "ppo_trainer"), list(command.overrides))
    parse(OmegaConf.to_container(config.grad_routing, resolve=True))  # type: ignore[arg-type]
