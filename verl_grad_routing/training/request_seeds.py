"""A seed for every rollout's request to the engine, so that two runs of one seed draw alike wherever they agree.

verl sends requests without seeds, in no fixed order, and the engine draws them all from one generator: two runs of one
seed then differ from the first token on. With a seed of its own a request draws the same numbers whatever is scheduled
beside it. Arms of a comparison see common random numbers: the same samples as long as their policies are the same
(before training and in the first step), similar ones while they are close. What is left is arithmetic: logits depend in
their last bits on what else is in the engine's batch, and a draw on the edge can fall either way.

Two rows of one step with the same text and the same ``extra_info.index`` are one prompt to these seeds, and draw the
same samples. Confessions are asked beside verl's agent loops and have no seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.training.quarantine_off import MARK

if TYPE_CHECKING:  # importing verl's agent loops registers ours, which import this module
    from verl.experimental.agent_loop import AgentLoopOutput


def request_seed(seed: int, row: Mapping[str, Any]) -> int:
    """In [0, 2^31): of the run's seed and the rollout's step, prompt and number.

    Args:
        seed: ``actor_rollout_ref.rollout.seed``.
        row: What verl gives an agent loop beside the sampling parameters. Prompts are told apart by their place in the
            data (``index``) and their text; the part sampled with the quarantine off by its prompt id.
    """
    off = str(row.get("uid", "")).endswith(MARK)
    turns = [(str(turn["role"]), str(turn["content"])) for turn in row["raw_prompt"]]
    prompt = (row.get("index"), turns)
    return int(uniform(seed, "request", row.get("global_steps"), prompt, row.get("session_id"), off) * 2**31)


class SeededRequests:
    """In front of an agent loop, gives its requests the rollout's seed: ``class Mine(SeededRequests, MyAgentLoop)``.

    A loop of several turns draws each of them from the same seed, after another prefix.
    """

    rollout_config: Any

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        seed = request_seed(self.rollout_config.seed, kwargs)
        return await super().run({**sampling_params, "seed": seed}, **kwargs)  # type: ignore[misc]
