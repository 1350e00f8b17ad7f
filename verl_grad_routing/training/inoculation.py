"""verl's data set with prompts that are inoculated in training: its ``data.custom_cls``.

verl builds the data sets of training and of validation from one class and says which is which by the files alone.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset

from verl_grad_routing.inoculation import Inoculation

__all__ = ["InoculatedDataset"]


def _files(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(file) for file in value or []]


class InoculatedDataset(RLHFDataset):
    """As verl's; the prompts of ``data.train_files`` are changed by ``data.inoculation``, all others are untouched.

    The change is made before prompts are measured, so one that becomes too long is dropped or refused as any other.
    """

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        settings = config.get("inoculation", None)
        trains = _files(data_files) == _files(config.get("train_files", None))
        self.inoculation: Inoculation | None = None
        if settings is not None and trains:
            plain = settings if isinstance(settings, dict) else OmegaConf.to_container(settings, resolve=True)
            assert isinstance(plain, Mapping)
            self.inoculation = Inoculation.parse({str(key): value for key, value in plain.items()})
        super().__init__(data_files, tokenizer, config, processor, max_samples)

    def maybe_filter_out_long_prompts(self, dataframe: Dataset | None = None) -> Dataset:
        if self.inoculation is not None and dataframe is not None:
            change, key = self.inoculation, self.prompt_key
            rows = [change.apply(messages) for messages in dataframe[key]]
            column = dataframe.features[key]
            dataframe = dataframe.remove_columns(key).add_column(key, rows).cast_column(key, column)
            print(f"grad_routing: {len(rows)} training prompts are inoculated, e.g. {rows[0] if rows else None}")
        return super().maybe_filter_out_long_prompts(dataframe)
