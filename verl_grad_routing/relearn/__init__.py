"""The relearning attack: how many steps of fine-tuning on hacks bring back what ablation took away."""

from verl_grad_routing.relearn.attack import relearn
from verl_grad_routing.relearn.settings import Relearn

__all__ = ["Relearn", "relearn"]
