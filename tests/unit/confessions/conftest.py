"""A trainer over a TransferQueue in memory that has neither workers nor an engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from tests.modules.memory_queue import Queue


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    import transfer_queue as tq

    made = Queue()
    for name, call in made.calls.items():
        monkeypatch.setattr(tq, name, call)
    return made


class Engine:
    """A rollout engine that answers by a function of prompt tokens and notes what it was asked."""

    def __init__(self, says: Callable[[list[int], int], int]):
        self.says, self.prompts = says, []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict) -> Any:
        assert sampling_params.pop("max_tokens") == 1
        self.prompts.append(prompt_ids)
        return SimpleNamespace(token_ids=[self.says(prompt_ids, len(self.prompts))], log_probs=[-0.25])


@cache
def composed() -> DictConfig:
    import verl  # noqa: F401  (loads the plugin)

    given = ["+grad_routing=confessions", "+grad_routing/environment=loopholes", "+grad_routing/hardware=cpu"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", given)


@pytest.fixture
def trainer(queue: Queue) -> Callable[..., Any]:
    """``trainer(engine, *overrides)``: ours, with real configuration and tokenizer."""
    import verl.trainer.ppo.v1  # noqa: F401  (loads the plugin, which registers our trainer)

    from verl_grad_routing.config import parse
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET
    from verl_grad_routing.training.trainer import GradRoutingTrainer

    def make(engine: Engine, *overrides: str) -> Any:
        made = GradRoutingTrainer.__new__(GradRoutingTrainer)
        made.config = OmegaConf.merge(composed(), OmegaConf.from_dotlist(list(overrides)))
        made.tokenizer, made.global_steps = build_tokenizer(ALPHABET), 1
        made.settings = parse(OmegaConf.to_container(made.config.grad_routing, resolve=True))
        made.timing_raw, made.validated = {}, []
        made.get_llm_client = lambda: engine
        return made

    return make
