"""A short clean warm-up by verl's SFT trainer, and the basis of what it changed (TDGA, arXiv 2605.25189)."""

from verl_grad_routing.warm_up.command import WarmUp, warm_up

__all__ = ["WarmUp", "warm_up"]
