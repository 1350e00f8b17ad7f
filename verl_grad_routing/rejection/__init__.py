"""Rejection fine-tuning with GRIFT (arXiv 2604.16242): sample, keep what is rewarded, drop what hacks, fine-tune."""

from verl_grad_routing.rejection.command import rft
from verl_grad_routing.rejection.settings import Rft

__all__ = ["Rft", "rft"]
