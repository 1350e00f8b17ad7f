"""What the character-level environments share: a sorting task, three voices, a small Llama trained from scratch.

An environment of this kind is a ``World``: how its prompts look, how they can be exploited, and its grader. The rest is
here: splits that share no task, demonstrations for the warm-up, contrastive pairs, the model and the folder. Importing
this package costs the standard library only.

Provenance. Everything is generated from a seed. No other text, data set or model goes in.
"""

from verl_grad_routing.envs.chars.alphabet import Alphabet
from verl_grad_routing.envs.chars.settings import CharSettings
from verl_grad_routing.envs.chars.task import SortingTask
from verl_grad_routing.envs.chars.world import World

__all__ = ["Alphabet", "CharSettings", "SortingTask", "World"]
