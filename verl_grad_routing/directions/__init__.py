"""Contrastive pairs, the persona directions they give, and control directions."""

from verl_grad_routing.directions.activation import (
    Direction,
    concept_direction,
    difference_of_means,
    layers_at_depth,
    project,
)
from verl_grad_routing.directions.controls import haar_directions, permuted_pairs
from verl_grad_routing.directions.pairs import (
    Message,
    Pair,
    PairSet,
    load_pairs,
    require_hash,
    rows_with_tag,
    split_held_out,
)
from verl_grad_routing.directions.pooling import POSITIONS, PoolPlan, pool_padded, pool_tokens, position_mask

__all__ = [
    "POSITIONS",
    "Direction",
    "Message",
    "Pair",
    "PairSet",
    "PoolPlan",
    "concept_direction",
    "difference_of_means",
    "haar_directions",
    "layers_at_depth",
    "load_pairs",
    "permuted_pairs",
    "pool_padded",
    "pool_tokens",
    "position_mask",
    "project",
    "require_hash",
    "rows_with_tag",
    "split_held_out",
]
