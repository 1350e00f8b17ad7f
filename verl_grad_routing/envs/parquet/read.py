"""Reading a data file in verl's format, with an error that names the file, the row and the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError


def read_rows(path: str) -> list[dict[str, Any]]:
    """All rows of a parquet file, checked; rows are counted from 1 in errors.

    Raises:
        UserError: No such file, no parquet, no rows, or a bad row.
    """
    import pyarrow
    import pyarrow.parquet

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError("data file", path, "no such file")
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(str(file), " ".join(str(error).split())[:80], "cannot be read as parquet") from None
    if not rows:
        raise UserError(str(file), 0, "no rows")
    for number, row in enumerate(rows, start=1):
        _check(f"{file} row {number}", row)
    return rows


def _check(where: str, row: Mapping[str, Any]) -> None:
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise UserError(f"{where} data_source", source, "give the name of the data's source")
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{where} prompt", prompt, 'give a list of messages {"role": ..., "content": ...}')
    for message in prompt:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{where} prompt", message, 'write each message as {"role": ..., "content": ...}')
    model = row.get("reward_model")
    if not isinstance(model, Mapping) or model.get("ground_truth") is None:
        raise UserError(f"{where} reward_model.ground_truth", model, "missing; the reward function is given it")
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise UserError(f"{where} extra_info", extra, "give a mapping, or leave the column out")
