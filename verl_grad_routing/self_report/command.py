"""``vgr interrogate``: from a model's folder or a run's checkpoint to admission rates."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_grad_routing.chat import load_tokenizer
from verl_grad_routing.envs import ENVIRONMENTS
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.self_report.interrogate import admission_report, answer_all, read_prompts, reply_log_probs
from verl_grad_routing.self_report.question import QUESTIONS, question_named


def interrogate_model(
    model: Path,
    environment: Path,
    *,
    split: str,
    question: str | None,
    limit: int,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    chat: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers of the model to the split's prompts, and what it says of them; see ``admission_report``.

    ``reply_share`` is the mean probability that it replies with one of the two at all.

    A checkpoint is asked as trained, with both blocks; ``chat`` are switches of its template. Raises ``UserError`` for
    whatever is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    manifest = Manifest.read(environment)
    known = {field.name for field in dataclasses.fields(ENVIRONMENTS[manifest.environment].Config)}
    settings = {key: value for key, value in manifest.settings.items() if key in known}  # a manifest has hashes, too
    grader = ENVIRONMENTS.build({"name": manifest.environment, **settings}, "environment")
    asked = question_named(question or (manifest.environment if manifest.environment in QUESTIONS else "chat"))
    rows = read_prompts(environment, split)
    rows = rows[:limit] if limit else rows
    with _model_folder(model) as folder:
        tokenizer = load_tokenizer(folder, chat)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    given = {"max_new_tokens": max_new_tokens or asked.answer_tokens, "temperature": temperature, "seed": seed}
    answers = answer_all(loaded, tokenizer, grader, rows, **given)
    admit_N, deny_N = reply_log_probs(loaded, tokenizer, answers, asked)
    replies = {"reply_share": float((admit_N.exp() + deny_N.exp()).mean())}
    return admission_report(admit_N - deny_N, answers) | replies


@contextmanager
def _model_folder(model: Path) -> Iterator[Path]:
    """``model`` if it is a Hugging Face folder, else the checkpoint there, exported whole for a while."""
    if (model / "config.json").is_file():
        yield model
        return
    from verl_grad_routing.deploy import export

    with tempfile.TemporaryDirectory() as scratch:
        export(model, Path(scratch) / "model", "hf", "both")
        yield Path(scratch) / "model"
