"""Commands and overrides, taken out of the pages as a reader would copy them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
TRAINER = "verl.trainer.main_ppo"

FENCED = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1`*[ ]*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMENT = re.compile(r"(^|\s)#.*$")
PLACEHOLDER = re.compile(r"<[\w ]+>|\.\.\.(?=\s|$)")  # <your overrides>, and ... for them
SCRIPT = re.compile(r"(?:^|/)run\w*\.sh$")  # of a recipe: overrides go behind its name
OVERRIDE = re.compile(r"[+~]{0,2}[a-z_]\w*(?:[./@][\w-]+)*=")
TREE = ("grad_routing", "actor_rollout_ref", "algorithm", "data", "ray_kwargs", "reward", "trainer")


@dataclass(frozen=True)
class Command:
    """Arguments of verl's trainer, or of a recipe's script.

    Attributes:
        overrides: As the shell would hand them to Hydra; variables stay as they are written.
        options: ``--config-path`` and its like.
        whole: Nothing is left to the reader, and it is verl's own command.
    """

    overrides: tuple[str, ...]
    options: dict[str, str]
    whole: bool


def fences(text: str, language: str) -> list[str]:
    """What stands in the fenced blocks of ``language``."""
    return [match[3] for match in FENCED.finditer(text) if match[2].strip() == language]


def commands(text: str) -> Iterator[Command]:
    """Every command with overrides in the fenced bash blocks of ``text``; a line of overrides alone is one, too."""
    for block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = COMMENT.sub("", line).strip()
            words = shlex.split(PLACEHOLDER.sub(" ", line))
            starts = [i for i, word in enumerate(words) if word == TRAINER or SCRIPT.search(word)]
            if starts:
                yield _command(words[starts[0] + 1 :], TRAINER in words and not PLACEHOLDER.search(line))
            elif words and OVERRIDE.match(words[0]):
                yield _command(words, False)


def _command(words: list[str], whole: bool) -> Command:
    overrides, options, rest = [], {}, iter(words)
    for word in rest:
        if word.startswith("--"):
            options[word] = next(rest)
        elif OVERRIDE.match(word):
            overrides.append(word)
    return Command(tuple(overrides), options, whole)


def inline_overrides(text: str) -> Iterator[str]:
    """Every override in the inline code of ``text``."""
    for match in INLINE.finditer(FENCED.sub("", text)):
        code = PLACEHOLDER.sub("x", " ".join(match[1].split())) if "<" in match[1] else " ".join(match[1].split())
        if OVERRIDE.match(code.lstrip("\"'")):
            yield from (word for word in shlex.split(code) if re.match(rf"[+~]*(?:{'|'.join(TREE)})[\w./]*=", word))
