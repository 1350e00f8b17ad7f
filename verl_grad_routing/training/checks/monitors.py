"""What monitors, probes and inoculation ask of the rest of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run

DATASET = "InoculatedDataset"


def probe_model(run: Run) -> None:
    """A probe reads the activations of the model that it was fitted on."""
    from verl_grad_routing.subspaces.basis import model_hash

    expected = getattr(run.methods.detector, "model_hash", None)
    folder = Path(str(run.get("actor_rollout_ref.model.path"))).expanduser()
    if run.routed and expected and folder.is_dir() and model_hash(folder) != expected:
        fix = f"it was fitted on another model than {folder}; fit one on this: vgr probe fit"
        raise UserError("grad_routing.detector.probe", run.settings.detector["probe"], fix)


def inoculation(run: Run) -> None:
    """Prompts of training are told from those of validation by their files."""
    from verl_grad_routing.inoculation import Inoculation

    settings = run.get("data.inoculation")
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise UserError("data.inoculation", settings, "give system, prefix or substitute")
    Inoculation.parse(settings)
    if run.get("data.custom_cls.name") != DATASET:
        fix = f"data.inoculation needs verl's seam for data sets; leave {DATASET} to the preset"
        raise UserError("data.custom_cls.name", run.get("data.custom_cls.name"), fix)
    train, val = (run.get(f"data.{split}_files") for split in ("train", "val"))
    train, val = ([files] if isinstance(files, str) else list(files or []) for files in (train, val))
    if set(train) & set(val):
        fix = "the same file is in data.train_files, so its prompts would be changed at test too; copy the file"
        raise UserError("data.val_files", val, fix)
