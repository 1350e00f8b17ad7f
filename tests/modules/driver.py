"""The driver of a run without workers: the trainer's own code over a TransferQueue in memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from verl_grad_routing.config import GradRoutingConfig, build_methods

GROUP = 4
"""Rollouts of a prompt."""
CONFIG = {
    "algorithm": {
        "adv_estimator": "grpo",
        "gamma": 1.0,
        "lam": 1.0,
        "use_kl_in_reward": False,
        "norm_adv_by_std_in_grpo": True,
        "rollout_correction": None,
    },
    "actor_rollout_ref": {"actor": {"ppo_epochs": 1, "ppo_mini_batch_size": 3}, "rollout": {"n": GROUP}},
}


def text(ids: Tensor, **_: Any) -> str:
    """What a monitor of texts reads: whether the first token's number is even."""
    return "even" if int(ids[0]) % 2 == 0 else "odd"


def trainer(config: GradRoutingConfig) -> Any:
    """The driver of a run; detectors that read gradients get fingerprints of two kinds."""
    from verl_grad_routing.training.router import Router
    from verl_grad_routing.training.trainer import GradRoutingTrainer

    made = object.__new__(GradRoutingTrainer)
    made.settings, made.router = config, Router(config, build_methods(config))
    made.detector, made.intervention, made.routed = made.router.detector, made.router.intervention, True
    made.config, made.tokenizer, made.timing_raw = OmegaConf.create(CONFIG), SimpleNamespace(decode=text), {}
    made.shadows, made.readers, made.penalties = [], [], {}

    def fingerprinted(_real: Any, view: Any, _detector: Any) -> Any:
        """One of two directions, by what the judge sees, and a little of another."""
        generator = torch.Generator().manual_seed(7)
        points = 0.2 * torch.rand(len(view.keys), 4, generator=generator)
        points[torch.arange(len(view.keys)), torch.tensor([int(said == "even") for said in view.responses])] += 1
        return dataclasses.replace(view, fingerprints_BF=torch.nn.functional.normalize(points, dim=1))

    made._fingerprinted = fingerprinted
    return made
