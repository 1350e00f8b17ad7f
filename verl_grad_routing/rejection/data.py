"""Kept responses as verl's SFT trainer reads data: its ``data.custom_cls``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from verl_grad_routing.errors import UserError
from verl_grad_routing.rejection.sample import Sample


def write_rows(path: Path, kept: Sequence[Sample], full_text: bool) -> None:
    """One JSON line for each response: its tokens, the prompt's, and whether the prompt is learned too."""
    rows = [{"prompt": list(one.prompt), "response": list(one.response), "full_text": full_text} for one in kept]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class KeptResponses(Dataset):
    """The rows of a file that ``write_rows`` wrote, unpadded; no chat template comes in between.

    Args:
        parquet_files: ``data.train_files``: the file.
        config: verl's ``data`` section; a row longer than its ``max_length`` is refused, never cut.
    """

    def __init__(self, parquet_files: str, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        del tokenizer, processor, max_samples
        self.rows = [json.loads(line) for line in Path(parquet_files).read_text().splitlines()]
        longest = max(len(row["prompt"]) + len(row["response"]) for row in self.rows)
        if longest > config.max_length:
            raise UserError("data.max_length", config.max_length, f"the longest row has {longest} tokens; raise it")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        tokens = [*row["prompt"], *row["response"]]
        learned = [int(row["full_text"])] * len(row["prompt"]) + [1] * len(row["response"])
        return {
            "input_ids": torch.tensor(tokens),
            "position_ids": torch.arange(len(tokens)),
            # the first token has nothing that predicts it
            "loss_mask": torch.tensor([0, *learned[1:]]),
        }
