"""The wanted sides of contrastive pairs as verl's SFT trainer reads data: its ``data.custom_cls``.

Tokens are those that directions are taken from, so a plain prompt needs no chat template.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from verl_grad_routing.chat import with_switches
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.pairs_pass import pair_tokens


class CleanSides(Dataset):
    """One row per pair: the prompt without loss, the wanted side with it, unpadded.

    Args:
        parquet_files: ``data.train_files``: an address of pairs, path.jsonl[@tag,tag] or path.md#section[@tag,tag].
        tokenizer: The model's.
        config: verl's ``data`` section; a row longer than its ``max_length`` is refused, never cut.
    """

    def __init__(self, parquet_files: str, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        del processor
        if config.get("pad_mode") != "no_padding":
            raise UserError("data.pad_mode", config.get("pad_mode"), "set no_padding")
        if max_samples != -1:
            raise UserError("data.train_max_samples", max_samples, "choose pairs by tag instead")
        self.rows: list[tuple[list[int], list[int]]] = []
        tokenizer = with_switches(tokenizer, config.get("apply_chat_template_kwargs"))
        for pair in load_pairs(parquet_files):
            prompt, _, wanted = pair_tokens(pair, tokenizer)
            if len(prompt) + len(wanted) > config.max_length:
                fix = f"pair {pair.id} has {len(prompt) + len(wanted)} tokens; raise it"
                raise UserError("data.max_length", config.max_length, fix)
            self.rows.append((prompt, wanted))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, wanted = self.rows[index]
        length = len(prompt) + len(wanted)
        return {
            "input_ids": torch.tensor([*prompt, *wanted]),
            "position_ids": torch.arange(length),
            "loss_mask": torch.tensor([0] * len(prompt) + [1] * len(wanted)),
        }
