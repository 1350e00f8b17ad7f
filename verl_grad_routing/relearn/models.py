"""The models of an attack, each as an ordinary Hugging Face folder with a tokenizer; and trained weights put into one.

Whatever was trained, exported or given is attacked in the same way, by all of its parameters.
"""

# What AutoModel and AutoTokenizer return depends on the model.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from verl_grad_routing.deploy.artefact import load_adapted, merge, write_model
from verl_grad_routing.deploy.checkpoint import find_checkpoint, read_json
from verl_grad_routing.deploy.exporter import export
from verl_grad_routing.deploy.models import load_model, saved_dtype
from verl_grad_routing.errors import UserError
from verl_grad_routing.relearn.settings import Relearn

DEPLOYED, TRAINED = "deployed", "as trained"
MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Contestants:
    """Folders of models.

    Attributes:
        attacked: By name, what is attacked first, then the baselines.
        trained: The model as trained; None where the goal is a number.
        named: What each was made from, for the report.
    """

    attacked: dict[str, Path]
    trained: Path | None
    named: dict[str, str]


def contestants(settings: Relearn, scratch: Path) -> Contestants:
    """Every model of the attack as a folder, those that are none yet written below ``scratch``.

    Raises:
        UserError: A model cannot be read or exported, there is no goal or no baseline, or vocabularies differ.
    """
    checkpoint = not ((settings.model / MODEL_FILE).is_file() or (settings.model / ADAPTER_FILE).is_file())
    trained, baselines = settings.trained, settings.baselines
    base = str(settings.base_model) if settings.base_model is not None else None
    if checkpoint:
        layout = find_checkpoint(settings.model).layout
        base = base or layout.base_model
        baselines = (Path(base),) if baselines is None else baselines
        if not layout.ablate_at_deployment:
            fix = "the run deploys both blocks (ablate_at_deployment: false): nothing was taken away to be relearned"
            raise UserError("MODEL", str(settings.model), fix)
    if trained is None and settings.target is None and not checkpoint:
        fix = "what is the goal? give the model as trained with --trained, or a hack rate with --target"
        raise UserError("--trained", None, fix)
    if not baselines:
        fix = "an attack says something beside one on another model only; give the model before RL with --baseline"
        raise UserError("--baseline", None, fix)
    attacked = {DEPLOYED: _folder(settings.model, scratch / "deployed", DEPLOYED, base)}
    named = {DEPLOYED: str(settings.model)}
    for number, path in enumerate(baselines):
        name = path.name if path.name not in attacked else f"{path.name} ({number + 1})"
        attacked[name] = _folder(path, scratch / f"baseline_{number}", DEPLOYED, base)
        named[name] = str(path)
    goal = trained if trained is not None else settings.model if checkpoint and settings.target is None else None
    found = None if goal is None else _folder(goal, scratch / "trained", "both", base)
    if goal is not None:
        named[TRAINED] = str(goal)
    _same_vocabulary({**attacked, **({TRAINED: found} if found is not None else {})})
    return Contestants(attacked, found, named)


def _folder(path: Path, to: Path, blocks: str, base: str | None) -> Path:
    if (path / MODEL_FILE).is_file() or not path.is_dir():  # a checkpoint may name its base model as the hub does
        return path
    to.parent.mkdir(parents=True, exist_ok=True)
    if (path / ADAPTER_FILE).is_file():
        base = base or str(read_json(path / ADAPTER_FILE)["base_model_name_or_path"])
        to.mkdir()
        write_model(to, merge(load_adapted(base, path)), saved_dtype(base))
        tokens = [file for file in path.iterdir() if "token" in file.name or file.suffix == ".jinja"]
        for file in tokens:
            shutil.copyfile(file, to / file.name)
    else:
        export(path, to, "hf", blocks, base)
    if base is not None and not any("token" in file.name for file in to.iterdir()):
        AutoTokenizer.from_pretrained(base).save_pretrained(to)
    return to


def _same_vocabulary(folders: Mapping[str, Path]) -> None:
    vocabularies = {name: AutoTokenizer.from_pretrained(folder).get_vocab() for name, folder in folders.items()}
    first = next(iter(vocabularies))
    for name, vocabulary in vocabularies.items():
        if vocabulary != vocabularies[first]:
            raise UserError("--baseline", name, f"its tokenizer is not that of {first}: the same rows mean other texts")


def loaded(folder: Path) -> Any:
    """The model in float32, on an accelerator where there is one."""
    return load_model(str(folder)).to("cuda" if torch.cuda.is_available() else "cpu")


def put_weights(model: Any, state: Mapping[str, Tensor]) -> None:
    """Load what verl's SFT trainer saved into ``model``. Raises ``UserError`` when it is of another model."""
    missing, unknown = model.load_state_dict({name: state[name] for name in state}, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    wrong = [*unknown, *sorted(set(missing) - tied)]
    if wrong:
        fix = "verl's SFT trainer saved other parameters than the model's; is verl as required?"
        raise UserError("relearn", wrong[0], fix)
