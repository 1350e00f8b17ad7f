"""Where a checkpoint's files are, and what they say about the run that wrote them.

A checkpoint of a run with blocks, as verl's FSDP checkpoint manager, the routed engine and the trainer write it::

    CKPT/latest_checkpointed_iteration.txt
    CKPT/global_step_N/grad_routing.pt             state of detector and gate
    CKPT/global_step_N/grad_routing.json           the resolved grad_routing settings
    CKPT/global_step_N/actor/model_world_size_W_rank_R.pt
    CKPT/global_step_N/actor/fsdp_config.json
    CKPT/global_step_N/actor/grad_routing_blocks.json
    CKPT/global_step_N/actor/huggingface/          configuration and tokenizer
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import get_form

LAYOUT_FILE = "grad_routing_blocks.json"
STATE_FILE = "grad_routing.pt"
SETTINGS_FILE = "grad_routing.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"
_STEP_FOLDER = "global_step_"


@dataclass(frozen=True)
class Layout:
    """Blocks that are adapters, from ``grad_routing_blocks.json``.

    Attributes:
        deployed_rank, quarantine_rank: Ranks of the blocks.
        scaling: LoRA's alpha / rank, the same for both.
        ablate_at_deployment: Deployment deletes the quarantine.
        base_model: The model that was trained on, as the run's configuration names it.
        form: What the blocks keep of each layer.
    """

    deployed_rank: int
    quarantine_rank: int
    scaling: float
    ablate_at_deployment: bool
    base_model: str
    form: str = "lora"

    kind: ClassVar[str] = "adapters"
    removed: ClassVar[str] = "adapters"

    @property
    def default_blocks(self) -> str:
        """What deployment keeps: ``deployed``, or ``both`` for a run whose blocks are not told apart."""
        return "deployed" if self.ablate_at_deployment else "both"

    def facts(self, blocks: str) -> dict[str, Any]:
        """What an export of ``blocks`` says of the layout."""
        return {
            "deployed_rank": self.deployed_rank,
            "quarantine_rank": self.quarantine_rank,
            "form": self.form,
            "rank": self.rank_of(blocks),
            "scaling": self.scaling,
        }

    def rank_of(self, blocks: str) -> int:
        """The rank of a plain adapter with ``blocks``: ``deployed``, ``quarantine`` or ``both``."""
        ranks = {"deployed": self.deployed_rank, "quarantine": self.quarantine_rank}
        return ranks.get(blocks, sum(ranks.values())) * get_form(self.form).sides

    def rows(self) -> dict[str, Any]:
        """The same for a model card's table."""
        return {
            "ranks in training": f"deployed {self.deployed_rank}, quarantine {self.quarantine_rank}",
            **({} if self.form == "lora" else {"form of the blocks in training": self.form}),
            "scaling (alpha / rank)": self.scaling,
        }


@dataclass(frozen=True)
class DenseLayout:
    """Blocks that are units of the base model.

    Attributes:
        units: ``layers``, ``mlp_units`` and ``heads`` of the quarantine.
        shared: What belongs to neither block.
        ablate_at_deployment: Deployment sets the quarantine's weights to zero, or takes its units away.
        base_model: The model that training started from.
        expansion: The record of ``vgr expand``, where the quarantine is what that has added.
    """

    units: Mapping[str, list[int]]
    shared: list[str]
    ablate_at_deployment: bool
    base_model: str
    expansion: Mapping[str, Any] | None = None

    kind: ClassVar[str] = "dense"

    @property
    def default_blocks(self) -> str:
        return "deployed" if self.ablate_at_deployment else "both"

    @property
    def removed(self) -> str:
        return "dense" if self.expansion is None else "expanded"

    def facts(self, blocks: str) -> dict[str, Any]:
        del blocks
        return {"units": dict(self.units), "shared": self.shared, "expansion": self.expansion}

    def rows(self) -> dict[str, Any]:
        return {
            "quarantined MLP units": ", ".join(map(str, self.units["mlp_units"])) or "none",
            "quarantined heads": ", ".join(map(str, self.units["heads"])) or "none",
            "in layers": ", ".join(map(str, self.units["layers"])),
            "of neither block": ", ".join(self.shared) or "nothing",
        }


LAYOUTS: dict[str, type[Layout] | type[DenseLayout]] = {cls.kind: cls for cls in (Layout, DenseLayout)}


@dataclass(frozen=True)
class Checkpoint:
    """One step's checkpoint.

    Attributes:
        actor: The folder that verl's checkpoint manager wrote.
        step: Global step; ``None`` when the folder's name does not tell.
        layout: The blocks.
    """

    actor: Path
    step: int | None
    layout: Any  # of a class in LAYOUTS

    @property
    def folder(self) -> Path:
        """The step's folder."""
        return self.actor.parent

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The run's resolved ``grad_routing`` settings; empty when the checkpoint has none."""
        path = self.folder / SETTINGS_FILE
        return read_json(path) if path.is_file() else {}

    @cached_property
    def state(self) -> Mapping[str, Any]:
        """State of detector and gate, ``{'detector': ..., 'gate': ...}``; empty when the checkpoint has none.

        A state that holds more than tensors and plain values (another package's method may) is not unpickled: the
        result then is ``{'unread': reason}``.
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            return {}
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            return {"unread": str(error).partition("\n")[0]}


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``: a step's folder, its ``actor`` folder, or a run's folder (then its latest step).

    Raises:
        UserError: There is no checkpoint, it has no blocks, or it is of another layout.
    """
    actor = _actor_folder(path)
    if not (actor / LAYOUT_FILE).is_file():
        fix = (
            f"has no {LAYOUT_FILE}: written without blocks (preset off); merge it with verl's own "
            f"`python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir DIR`"
        )
        raise UserError("CHECKPOINT", str(path), fix)
    saved = read_json(actor / LAYOUT_FILE)
    cls = LAYOUTS.get(saved.get("kind", Layout.kind))
    if cls is None:
        raise UserError(f"{actor / LAYOUT_FILE}:kind", saved["kind"], f"known: {', '.join(LAYOUTS)}")
    keys = {field.name: field.default is MISSING for field in fields(cls)}
    missing = [key for key, needed in keys.items() if needed and key not in saved]
    if missing:
        raise UserError(f"{actor / LAYOUT_FILE}:{missing[0]}", None, "missing: a checkpoint of another layout")
    layout = cls(**{key: saved[key] for key in keys if key in saved})
    number = actor.parent.name.removeprefix(_STEP_FOLDER)
    return Checkpoint(actor, int(number) if number.isdecimal() else None, layout)


def _actor_folder(path: Path) -> Path:
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise UserError("CHECKPOINT", str(path), "no such folder; give a global_step_N folder of a run")
    if (path / LATEST_FILE).is_file():
        latest = (path / LATEST_FILE).read_text().strip()
        path = path / f"{_STEP_FOLDER}{latest}"
        if not path.is_dir():
            raise UserError(LATEST_FILE, latest, f"{path} is not there; give a global_step_N folder of the run")
    for actor in (path, path / "actor"):
        if (actor / "fsdp_config.json").is_file():
            return actor
    fix = "no checkpoint of verl's FSDP engines there (fsdp_config.json is missing); give a global_step_N folder"
    raise UserError("CHECKPOINT", str(path), fix)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``UserError`` when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), str(error), "unreadable") from None
    if not isinstance(content, dict):
        raise UserError(str(path), type(content).__name__, "must hold a JSON object")
    return content
