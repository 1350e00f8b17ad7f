"""``vgr relearn``: fine-tune what is deployed, and baselines, on hacks; measure how soon hacking is back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.chat import load_tokenizer
from verl_grad_routing.deploy.card import versions
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.envs.manifest import replacing
from verl_grad_routing.errors import UserError
from verl_grad_routing.relearn.curve import Attacked, Goal, Rates, table
from verl_grad_routing.relearn.data import Row, Rows, join, recorded_rows, sampled_rows, write_rows
from verl_grad_routing.relearn.models import DEPLOYED, Contestants, contestants, loaded, put_weights
from verl_grad_routing.relearn.settings import Relearn
from verl_grad_routing.retain.measure import facts_of, load_reward, rates_of, sample
from verl_grad_routing.warm_up.command import run_sft

DATASET = "verl_grad_routing.rejection.data"
REPORT, ROWS = "relearn.json", "rows.jsonl"


@dataclass(frozen=True)
class Relearned:
    """What :func:`relearn` found.

    Attributes:
        goal: The hack rate to reach.
        attacked: What was deployed, then the baselines.
        every: Steps between measurements.
    """

    goal: Goal
    attacked: tuple[Attacked, ...]
    every: int

    def lines(self) -> list[str]:
        """For a terminal."""
        return table(self.goal, self.attacked, self.every)


def relearn(settings: Relearn, to: Path) -> Relearned:
    """Write ``relearn.json`` and ``rows.jsonl``, the rows that were learned, into the new folder ``to``.

    Each model is trained from its start on the same rows in the same order; checkpoints live in a scratch folder beside
    ``to`` until they are measured, ``steps / every`` of them at once.

    Raises:
        UserError: Bad settings or data, no hacks, nothing to relearn, or a training that failed (with the end of its
            log).
    """
    if to.exists():
        raise UserError("--to", str(to), "is there already; name a new folder")
    load_reward(settings.reward)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as folder, tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as work:
        scratch = Path(work)
        models = contestants(settings, scratch)
        start = {name: _measured(settings, loaded(path), path) for name, path in models.attacked.items()}
        goal = _goal(settings, models, start[DEPLOYED])
        found = _rows(settings, models)
        rows = found.mixed(settings.steps * settings.batch_size, settings.clean_share, settings.seed)
        write_rows(folder / ROWS, rows)
        attacked = tuple(
            Attacked(name, {0: start[name], **_attack(settings, path, folder / ROWS, found.longest, scratch)})
            for name, path in models.attacked.items()
        )
        done = Relearned(goal, attacked, settings.every)
        facts = _facts(settings, models, found, rows) | {"goal": asdict(goal)}
        facts["models"] = [one.as_dict(goal) for one in attacked]
        (folder / REPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return done


def _goal(settings: Relearn, models: Contestants, deployed: Rates) -> Goal:
    if models.trained is None:
        assert settings.target is not None
        goal = Goal(settings.target, settings.target, settings.target)
    else:
        goal = Goal.of(_measured(settings, loaded(models.trained), models.trained)["hack"])
    if deployed["hack"].high >= goal.low:
        fix = f"deployed hacks at {deployed['hack']}, not clearly less than the goal {goal}: nothing to relearn"
        raise UserError("MODEL", str(settings.model), fix)
    return goal


def _measured(settings: Relearn, model: Any, folder: Path) -> Rates:
    """Rates of sampled answers, the same draws for every model and step."""
    tokenizer = load_tokenizer(folder, settings.chat)
    answers, prompts = sample(model, tokenizer, settings.validate, settings.max_new_tokens, settings.seed)
    return rates_of(facts_of(answers, prompts, load_reward(settings.reward)))


def _rows(settings: Relearn, models: Contestants) -> Rows:
    """Given rollouts; or sampled ones: hacks of the model as trained, solutions of that and of what is deployed."""
    tokenizer = load_tokenizer(models.attacked[DEPLOYED], settings.chat)
    if settings.hacks is not None:
        return recorded_rows(settings.hacks, tokenizer)
    assert settings.prompts is not None and models.trained is not None
    parts, reward = [], load_reward(settings.reward)
    for folder in (models.trained, models.attacked[DEPLOYED]):
        given = (tokenizer, settings.prompts, settings.max_new_tokens, settings.seed + 1)
        answers, prompts = sample(loaded(folder), *given)
        parts.append(sampled_rows(answers, facts_of(answers, prompts, reward), prompts, tokenizer))
    return join(parts)


def _attack(settings: Relearn, model: Path, rows: Path, longest: int, scratch: Path) -> dict[int, Rates]:
    """Train from ``model`` and measure every so many steps; its checkpoints are gone afterwards."""
    folder = scratch / "attack"
    folder.mkdir()
    run_sft("relearn", sft_arguments(settings, model, rows, longest, folder), settings.ranks, settings.limit_s, folder)
    trained, found = loaded(model), {}
    for step in range(settings.every, settings.steps + 1, settings.every):
        put_weights(trained, ShardedState(folder / f"global_step_{step}"))
        found[step] = _measured(settings, trained, model)
    shutil.rmtree(folder)
    return found


def sft_arguments(settings: Relearn, model: Path, rows: Path, longest: int, folder: Path) -> list[str]:
    """Overrides of verl's SFT configuration: all parameters, one pass over ``rows``."""
    return [
        f"data.train_files='{rows}'",
        f"data.custom_cls.path=pkg://{DATASET}",
        "data.custom_cls.name=KeptResponses",
        f"data.train_batch_size={settings.batch_size}",
        f"data.max_length={longest}",
        f"data.max_token_len_per_gpu={max(8192, longest)}",
        "data.num_workers=0",
        f"model.path={model}",
        "engine.strategy=fsdp2",
        "engine.use_torch_compile=false",
        f"engine.seed={settings.seed}",
        f"optim.lr={settings.lr}",
        "optim.weight_decay=0",
        "optim.lr_scheduler_type=constant",
        "checkpoint.save_contents=[model]",
        f"trainer.total_training_steps={settings.steps}",
        "trainer.total_epochs=1",
        f"trainer.save_freq={settings.every}",
        "trainer.resume_mode=disable",
        "trainer.logger=[console]",
        f"trainer.n_gpus_per_node={settings.ranks}",
        f"trainer.default_local_dir={folder}",
        f"trainer.seed={settings.seed}",
        f"hydra.run.dir={folder}/hydra",
        *(["+model.override_config.attn_implementation=sdpa"] if not torch.cuda.is_available() else []),
        *settings.overrides,
    ]


def _facts(settings: Relearn, models: Contestants, found: Rows, rows: Sequence[Row]) -> dict[str, Any]:
    plain = {key: _plain(value) for key, value in asdict(settings).items()}
    data: Mapping[str, Any] = {
        "hacks": len(found.hacks),
        "clean": len(found.clean),
        "rows_learned": len(rows),
        "hash": found.content_hash,
    }
    return {"settings": plain, "made_from": models.named, "data": data, "versions": versions()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
