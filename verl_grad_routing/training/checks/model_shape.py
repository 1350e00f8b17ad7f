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
        The file's content; empty for a URL, which verl's workers fetch.

    Raises:
        UserError: There is no such folder, it holds no configuration, or the hub has no such model.
    """
    if "://" in model:
        return {}
    folder = Path(model).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(KEY, model, "no config.json there; give a Hugging Face model's folder")
        return json.loads(file.read_text(encoding="utf-8"))
    if model.startswith(("/", ".", "~")):
        raise UserError(KEY, model, "no such folder")
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError) as error:  # no connection and no cache, no such model, no name of a model
        fix = "neither a folder nor a model of the Hugging Face hub or of its cache; give a folder or owner/name"
        raise UserError(KEY, model, fix) from error


def shape_number(shape: dict[str, Any], name: str) -> int | None:
    """One of its numbers, where models of text and images keep it, too; ``None`` if it does not say."""
    return shape.get(name, (shape.get("text_config") or {}).get(name))
