"""Gates: scores of a whole batch in, one route per rollout out. ``GATES`` maps name to class; one idea per file.

A gate sees scores and the step, nothing else; so a rollout's route is a function of the batch's (and the run's) scores.
"""

from verl_grad_routing.gates.absorb import AbsorbAll
from verl_grad_routing.gates.base import GATES, Gate, GateDecision, PairMeans, PairScores, PairStatistics
from verl_grad_routing.gates.exponential import ExponentialQuantile
from verl_grad_routing.gates.fixed import FixedThreshold
from verl_grad_routing.gates.hysteresis import Hysteresis
from verl_grad_routing.gates.otsu import Otsu
from verl_grad_routing.gates.pairs import PairBand, PairMidpoint
from verl_grad_routing.gates.per_token import PerToken, TokenDecision, TokenGate
from verl_grad_routing.gates.quantile import BatchQuantile, HistoryQuantile, QuantileConfig, share_thresholds
from verl_grad_routing.gates.thresholds import ThresholdConfig, ThresholdGate, Thresholds, floor_share

__all__ = [
    "GATES",
    "AbsorbAll",
    "BatchQuantile",
    "ExponentialQuantile",
    "FixedThreshold",
    "Gate",
    "GateDecision",
    "HistoryQuantile",
    "Hysteresis",
    "Otsu",
    "PairBand",
    "PairMeans",
    "PairMidpoint",
    "PairScores",
    "PairStatistics",
    "PerToken",
    "QuantileConfig",
    "ThresholdConfig",
    "ThresholdGate",
    "Thresholds",
    "TokenDecision",
    "TokenGate",
    "floor_share",
    "share_thresholds",
]
