"""What prompts and rollouts of a step are called in every run, so that draws on their names are the same in every run.

verl's prompt ids are random numbers, new in each run. A prompt's place in the data is not: ``extra_info.index``, which
every data set of ours has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from verl_grad_routing.training.quarantine_off import MARK, prompt_of


def names_of(keys: Sequence[str], indices: Sequence[object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of each row's prompt and rollout.

    A prompt of which a part is sampled with the quarantine off is one prompt. Prompts of one step that share an index
    are numbered in the order of their ids, which is another in every run: they are told apart, and a warning says so.

    Args:
        keys: verl's, ``{prompt}_{session}_{output}`` [B].
        indices: Each row's ``extra_info.index`` [B].

    Returns:
        Names of prompts [B], names of rollouts [B].
    """
    ids = [prompt_of(key).removesuffix(MARK) for key in keys]
    sharing: dict[str, list[str]] = {}
    for index, one in sorted({(str(index), one) for index, one in zip(indices, ids, strict=True)}):
        sharing.setdefault(index, []).append(one)
    if any(len(same) > 1 for same in sharing.values()):
        warnings.warn(
            "several prompts of a step have the same extra_info.index: draws on them (coinflip, labels, dials of "
            "monitors, ties at caps) differ between runs of one seed; give every row of the data an index of its own",
            stacklevel=2,
        )
    prompts = tuple(f"{index}.{sharing[str(index)].index(one)}" for index, one in zip(indices, ids, strict=True))
    return prompts, tuple(prompt + key.removeprefix(one) for prompt, key, one in zip(prompts, keys, ids, strict=True))
