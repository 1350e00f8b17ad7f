"""Contrastive pairs that the model writes itself: the same prompts under two contrasting framings."""

from verl_grad_routing.self_pairs.framings import Framing, Framings, load_framings
from verl_grad_routing.self_pairs.prompts import load_prompts
from verl_grad_routing.self_pairs.validate import Candidate, Limits, Tally, verdict
from verl_grad_routing.self_pairs.write import SelfPairs, write_pairs

__all__ = [
    "Candidate",
    "Framing",
    "Framings",
    "Limits",
    "SelfPairs",
    "Tally",
    "load_framings",
    "load_prompts",
    "verdict",
    "write_pairs",
]
