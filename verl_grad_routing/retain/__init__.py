"""A fine-tune of the deployed block on clean data after the quarantine is gone, and what it changed."""

from verl_grad_routing.retain.tune import Retain, Retained, retain

__all__ = ["Retain", "Retained", "retain"]
