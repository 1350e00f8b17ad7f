"""What the trained model's ``config.json`` says, before anything loads the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError

KEY = "actor_rollout_ref.model.path"


def model_shape(model: str) -> dict[str, Any]:
    """The configuration of a model's folder, or of a model of the Hugging Face hub: from its cache, or the network.

    Args:
        model: As verl takes it: a folder, ``owner/name`` or a URL such as ``hdfs://...``.

    Returns:
        The file's content; empty where only verl's workers can have it: of a URL, and of a hub that cannot be reached
        or refuses from here (a line says so), as workers may have another network or token.

    Raises:
        UserError: There is no such folder, it holds no configuration, or the hub has no such model.
    """
    if "://" in model:
        return {}
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json", model)
    if model.startswith(("/", ".", "~")):
        raise UserError(KEY, model, "no such folder")
    return _of_hub(model)


def shape_number(shape: dict[str, Any], name: str) -> int | None:
    """One of its numbers, where models of text and images keep it, too; ``None`` if it does not say."""
    return shape.get(name, (shape.get("text_config") or {}).get(name))


def _read(file: Path, model: str) -> dict[str, Any]:
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(KEY, model, "no config.json there; give a Hugging Face model's folder") from error
    except (OSError, ValueError) as error:
        raise UserError(KEY, model, f"its config.json cannot be read: {_line(error)}") from error
    if not isinstance(shape, dict):
        raise UserError(KEY, model, "its config.json is no mapping; give a Hugging Face model's folder")
    return shape


def _of_hub(model: str) -> dict[str, Any]:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from transformers import PretrainedConfig

    try:
        shape = PretrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error
        nowhere = isinstance(cause, (RepositoryNotFoundError, HFValidationError))
        if constants.HF_HUB_OFFLINE or (nowhere and not isinstance(cause, GatedRepoError)):
            fix = f"no such folder, nor a model of the Hugging Face hub that can be had here ({_line(error)})"
            raise UserError(KEY, model, fix) from error
        print(f"WARN: {KEY}={model!r} cannot be looked at here, so its layers are not checked: {_line(error)}")
        return {}
    if not shape:
        raise UserError(KEY, model, "the Hugging Face hub has no config.json of it; give a model of transformers")
    return shape


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
