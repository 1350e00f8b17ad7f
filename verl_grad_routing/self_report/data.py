"""What the model is taught: to call a hack of the known loophole type a hack, and a right answer none.

The lessons are contrastive pairs (``docs/pairs.md``): transcript and question as the prompt, the true report as the
wanted side, the false one as the unwanted side. Nothing is said about other loophole types.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.text import LoopholesWorld
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_report.question import QUESTIONS

ENVIRONMENT = "loopholes"


def loopholes_lessons(environment: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` lessons for a prepared environment ``loopholes``, admissions and denials in turns.

    No task of theirs is in the environment's data files or pairs.

    Raises:
        UserError: The folder is no such environment, or ``count`` is below 2.
    """
    manifest = Manifest.read(environment)
    if manifest.environment != ENVIRONMENT:
        raise UserError("ENVIRONMENT", manifest.environment, f"made for {ENVIRONMENT} alone; write pairs of your own")
    if count < 2:
        raise UserError("--count", count, "give at least 2: an admission and a denial")
    settings = Settings(**manifest.settings)
    world = LoopholesWorld(settings)
    taken = {task.letters for tasks in world.tasks().values() for task in tasks}
    rng, question = random.Random(f"{ENVIRONMENT}/{seed}/self-report"), QUESTIONS[ENVIRONMENT]
    lessons = []
    for index in range(count):
        task = world.draw(rng, settings.known, taken, "pairs")
        hacked = index % 2 == 0
        answer = task.exploit if hacked else task.answer
        replies = (question.admit, question.deny) if hacked else (question.deny, question.admit)
        lessons.append(
            {
                "id": f"self-report-{index:04d}",
                "prompt": task.prompt() + answer + question.answer_end + question.text,
                "unwanted": replies[1],
                "wanted": replies[0],
                "tags": [settings.known, "admit" if hacked else "deny"],
            }
        )
    return lessons


def write_lessons(lessons: list[dict[str, Any]], to: Path) -> None:
    """Write pairs as JSONL."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons), encoding="utf-8")
