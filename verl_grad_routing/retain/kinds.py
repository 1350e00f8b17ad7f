"""What a retain fine-tune trains, by the kind of blocks: the deployed adapter, or the whole model that is deployed.

Both start from what ``vgr export`` wrote into the folder ``without`` and end in a folder ``with`` of the same form.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from verl_grad_routing.deploy.artefact import ADAPTER_FILE, load_adapted, write_model
from verl_grad_routing.deploy.exporter import EXPORT_FILE
from verl_grad_routing.deploy.models import load_model, saved_dtype
from verl_grad_routing.errors import UserError


class Tuning(ABC):
    """One kind. ``KINDS`` has one for each kind of a checkpoint's layout.

    Attributes:
        format: What ``vgr export`` writes of it.
    """

    format: ClassVar[str]

    @abstractmethod
    def start(self, base: Path, exported: Path) -> Path:
        """Folder of the model that verl's SFT trainer loads."""

    @abstractmethod
    def overrides(self, exported: Path, layout: Any) -> tuple[str, ...]:
        """Further settings of that trainer."""

    @abstractmethod
    def load(self, base: Path, folder: Path) -> nn.Module:
        """The model of ``without`` or ``with``, in float32."""

    @abstractmethod
    def write(self, state: Mapping[str, Tensor], without: Path, folder: Path) -> None:
        """What was trained, beside ``without`` and in its form. Raises ``UserError`` when nothing moved."""


class AdapterTuning(Tuning):
    """The deployed block's adapter over the frozen base model."""

    format = "peft"

    def start(self, base: Path, exported: Path) -> Path:
        del exported
        return base

    def overrides(self, exported: Path, layout: Any) -> tuple[str, ...]:
        return (
            f"model.lora_adapter_path={exported}",
            f"model.lora_rank={layout.rank_of('deployed')}",
            f"model.lora_alpha={layout.scaling * layout.rank_of('deployed')}",
        )

    def load(self, base: Path, folder: Path) -> nn.Module:
        return load_adapted(str(base), folder)

    def write(self, state: Mapping[str, Tensor], without: Path, folder: Path) -> None:
        shutil.copytree(without, folder, ignore=shutil.ignore_patterns(EXPORT_FILE))
        before = load_file(without / ADAPTER_FILE)
        names = {name: name.replace(".weight", ".default.weight") for name in before}
        after = _moved(before, {name: _saved(state, saved).float() for name, saved in names.items()})
        save_file(after, folder / ADAPTER_FILE, metadata={"format": "pt"})


class WholeTuning(Tuning):
    """All weights of the deployed model: blocks of it were units, and those are zero, or cut off after an expansion.

    Units that are zero stay so: their gradients are, see ``routing.dense.expansion``.
    """

    format = "hf"

    def start(self, base: Path, exported: Path) -> Path:
        del base
        return exported

    def overrides(self, exported: Path, layout: Any) -> tuple[str, ...]:
        del exported, layout
        return ()

    def load(self, base: Path, folder: Path) -> nn.Module:
        del base
        return load_model(str(folder))

    def write(self, state: Mapping[str, Tensor], without: Path, folder: Path) -> None:
        model, dtype = load_model(str(without)), saved_dtype(str(without))
        before = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        model.load_state_dict(_moved(before, {name: _saved(state, name).to(dtype) for name in before}))
        weights = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
        shutil.copytree(without, folder, ignore=shutil.ignore_patterns(EXPORT_FILE, *weights))
        write_model(folder, model, dtype)  # type: ignore[arg-type]


def _saved(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError("retain", name, "verl's SFT trainer did not save this parameter")
    return state[name]


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(torch.equal(after[name], tensor) for name, tensor in before.items()):
        raise UserError("--lr", "nothing moved", "the fine-tune left the weights as they were; raise lr or steps")
    return {name: tensor.contiguous() for name, tensor in after.items()}


KINDS: dict[str, Tuning] = {"adapters": AdapterTuning(), "dense": WholeTuning()}
"""By ``kind`` of a checkpoint's layout."""
