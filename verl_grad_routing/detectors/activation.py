"""Detectors that project pooled activations on a direction; one file per way of choosing the direction.

Legend: ``P`` pairs, ``L`` chosen layers, ``d`` hidden size, ``D`` directions (1 here), ``B`` rollouts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.bottleneck import BASES, Bottleneck
from verl_grad_routing.detectors.base import BatchView, Detector
from verl_grad_routing.detectors.features import FeatureBuffer
from verl_grad_routing.directions.activation import Direction, layers_at_depth, project
from verl_grad_routing.directions.checks import as_tuple, require_choice, require_int, require_number
from verl_grad_routing.directions.pairs import GIVE_OVERRIDE, PairSet, require_same_hash
from verl_grad_routing.errors import UserError

KEY = "grad_routing.detector"
SCORE_PASSES = ("auto", "reference", "policy", "ablated")
RESIDUAL = "residual"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Reading:
    """What a direction is chosen from, checked; the attributes are the arguments of ``ActivationDetector.fit``."""

    unwanted_PLd: Tensor | None
    wanted_PLd: Tensor | None
    layers: tuple[int | str, ...]
    hidden_size: int
    pairs_hash: str | None

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """(unwanted, wanted) of a detector that needs pairs."""
        assert self.unwanted_PLd is not None and self.wanted_PLd is not None  # checked by fit
        return self.unwanted_PLd, self.wanted_PLd


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Where activations are read."""

    layers: tuple[int, ...] | None = None  # residual stream after these blocks, counted from 1; null: by depth
    depth: tuple[float, float] = (0.60, 0.75)  # shares of the model's depth, where layers is null
    # Which forward pass is read. reference: the bare base model (adapters off); policy: the log-prob pass, quarantine
    # on; ablated: quarantine off. auto: reference where the actor makes that pass anyway for a KL term, else policy.
    score_pass: str = "auto"
    refresh_every: int = 0  # policy and ablated passes: re-extract the direction every so many steps; 0: never
    seed: int = 0  # of whatever is random in choosing the direction
    # What is read. residual: the residual stream; svd or lora: bottleneck coordinates of the layers' linear modules.
    coordinates: str = RESIDUAL
    targets: tuple[str, ...] = LINEAR  # those modules by name
    rank: int = 32  # coordinates of each module
    basis_seed: int = 0  # of coordinates that are drawn: lora

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = as_tuple("layers", self.layers)
            for layer in layers:
                require_int("layers", layer, 1)
            if not layers or len(set(layers)) != len(layers):
                raise UserError("layers", list(layers), "give different layers, at least one, or null")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        depth = as_tuple("depth", self.depth)
        for share in depth:
            require_number("depth", share, 0, 1)
        if len(depth) != 2 or depth[0] > depth[1]:
            raise UserError("depth", list(depth), "give two shares of the depth, the lower one first")
        object.__setattr__(self, "depth", depth)
        require_choice("score_pass", self.score_pass, SCORE_PASSES)
        require_int("refresh_every", self.refresh_every, 0)
        require_int("seed", self.seed, 0)
        self._check_bottleneck()
        if self.score_pass == "reference" and self.refresh_every:
            fix = "set 0: the base model of the reference pass does not change"
            raise UserError("refresh_every", self.refresh_every, fix)

    def _check_bottleneck(self) -> None:
        require_choice("coordinates", self.coordinates, (RESIDUAL, *BASES))
        targets = as_tuple("targets", self.targets)
        if not targets or len(set(targets)) != len(targets) or not all(isinstance(name, str) for name in targets):
            raise UserError(
                "targets", list(targets), "give the names of different linear layers, as in [q_proj, v_proj]"
            )
        object.__setattr__(self, "targets", targets)
        require_int("rank", self.rank, 1)
        require_int("basis_seed", self.basis_seed, 0)


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ActivationConfig):
    """As ``ActivationConfig``, with contrastive pairs."""

    pairs: str = ""  # required: path.jsonl[@tag,tag] or path.md#section[@tag,tag]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pairs, str) or not self.pairs:
            raise UserError("pairs", self.pairs, GIVE_OVERRIDE)


class ActivationDetector(Detector):
    """Scores a rollout by the projection of its pooled activation on a direction.

    The score is the mean over layers of ``<h_l, v_l>``: higher means further along the direction. That points from the
    wanted to the unwanted sides of the pairs where there are pairs, and nowhere in particular where there are none.

    The trainer calls ``resolve_layers``, ``expect`` and ``fit``, hands ``directions_DLd`` to the workers, and fits
    again at every refresh.

    Class attributes:
        needs_pairs: ``fit`` needs the pooled activations of contrastive pairs.
    """

    needs_directions: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True
    config: ActivationConfig

    @property
    def position(self) -> str:
        """Which tokens of a rollout are read, one of ``directions.POSITIONS``."""
        return "resp_mean"

    @property
    def pair_position(self) -> str:
        """The same for the pairs, whose two sides share their prompt: never a prompt's token."""
        return "resp_last" if self.position == "prompt_last" else self.position

    def __init__(self, config: ActivationConfig):
        super().__init__(config)
        self.direction: Direction | None = None
        self.refresh_cosine = math.nan  # between the direction and the one before the last refresh, mean over layers
        self.bottleneck: Bottleneck | None = None
        self.basis_digest_M: Tensor | None = None
        self.buffer = FeatureBuffer()

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to read in a model of ``num_layers`` blocks. Raises ``UserError`` when one is out of range."""
        if self.config.layers is None:
            return layers_at_depth(num_layers, *self.config.depth)
        if max(self.config.layers) > num_layers:
            raise UserError(f"{KEY}.layers", list(self.config.layers), f"the model has layers 1 to {num_layers}")
        return self.config.layers

    def place(self, layers: tuple[int, ...]) -> Bottleneck | None:
        """The bottleneck on ``layers`` that is read; ``None`` for the residual stream. Then ``placed`` follows."""
        config = self.config
        if config.coordinates != RESIDUAL:
            self.bottleneck = Bottleneck(layers, config.targets, config.rank, config.coordinates, config.basis_seed)
        return self.bottleneck

    def placed(self, digest_M: Tensor) -> None:
        """Take the digest of the bases that the workers made, so that a resumed run is known to have the same."""
        self.basis_digest_M = digest_M

    def resolve_score_pass(self, reference_in_actor: bool) -> str:
        """``score_pass`` with ``auto`` decided: does the actor make a reference pass for a KL term anyway?"""
        if self.config.score_pass != "auto":
            return self.config.score_pass
        return "reference" if reference_in_actor else "policy"

    def expect(self, pairs: PairSet) -> None:
        """Told before ``fit`` which pairs its activations are of; a detector that reads their tags overrides this."""
        del pairs

    def fit(
        self,
        unwanted_PLd: Tensor | None,
        wanted_PLd: Tensor | None,
        layers: Sequence[int | str],
        hidden_size: int,
        pairs_hash: str | None = None,
    ) -> None:
        """Choose the direction, for the first time or again.

        Args:
            unwanted_PLd: Pooled activations of the unwanted sides; ``None`` for a detector without pairs.
            wanted_PLd: Those of the wanted sides, in the same order.
            layers: What ``resolve_layers`` gave; with a bottleneck, its modules by name.
            hidden_size: d; with a bottleneck, its rank.
            pairs_hash: Content hash of the pairs.

        Raises:
            UserError: Activations are missing or do not fit; the two sides do not differ; or layers, hidden size or
                pairs are not those of the direction that is there already.
        """
        if self.needs_pairs and (unwanted_PLd is None or wanted_PLd is None or pairs_hash is None):
            raise UserError(KEY, self.name, "fit needs the activations of the pairs' two sides and the pairs' hash")
        for side in (unwanted_PLd, wanted_PLd):
            if self.needs_pairs and side is not None and tuple(side.shape[1:]) != (len(layers), hidden_size):
                fix = f"pair activations must be [P, {len(layers)}, {hidden_size}]"
                raise UserError(KEY, tuple(side.shape), fix)
        read = Reading(unwanted_PLd, wanted_PLd, tuple(layers), hidden_size, pairs_hash)
        new = self._scored(self._choose(read), read)
        old = self.direction
        if old is not None:
            _require_same(new, old)
            self.refresh_cosine = float(
                torch.cosine_similarity(new.vectors_Ld.double(), old.vectors_Ld.double(), dim=-1).mean()
            )
            self.buffer.stale = True
        self.direction = new

    @abstractmethod
    def _choose(self, read: Reading) -> Direction:
        """The direction."""

    def _scored(self, direction: Direction, read: Reading) -> Direction:
        """``direction`` with its pairs scored as rollouts are, where that is not by projection."""
        del read
        return direction

    @property
    def directions_DLd(self) -> Tensor:
        """Vectors to project on, float32 ``[1, L, d]``. Raises ``UserError`` before ``fit``."""
        return self._fitted().vectors_Ld[None]

    @property
    def pair_means(self) -> tuple[float, float] | None:
        """Mean projection of the pairs' (unwanted, wanted) sides; ``None`` without pairs."""
        if not self.needs_pairs:
            return None
        direction = self._fitted()
        return direction.unwanted_mean, direction.wanted_mean

    @property
    def pair_scores(self) -> tuple[Tensor, Tensor] | None:
        """Projections [P], float64, of the pairs' (unwanted, wanted) sides; ``None`` without pairs."""
        if not self.needs_pairs:
            return None
        direction = self._fitted()
        return direction.unwanted_scores_P, direction.wanted_scores_P

    def direction_report(self) -> dict[str, float]:
        """Metrics of the direction: held-out accuracy, the pairs' mean scores and gap, cosine of the last refresh."""
        direction = self._fitted()
        report = {
            "detector/held_out_accuracy": direction.held_out_accuracy,
            "detector/pair_unwanted_mean": direction.unwanted_mean,
            "detector/pair_wanted_mean": direction.wanted_mean,
            "detector/pair_gap": direction.unwanted_mean - direction.wanted_mean,
            "detector/refresh_cosine": self.refresh_cosine,
        }
        return {name: value for name, value in report.items() if not math.isnan(value)}

    def score(self, view: BatchView) -> Tensor:
        """Projection on the first direction, [B] float64; see the class for its sign."""
        scores_BD = view.activation_scores_BD
        if scores_BD is None:
            raise UserError(
                KEY, self.name, "the batch has no activation scores; the worker must project on the directions"
            )
        if scores_BD.ndim != 2 or scores_BD.shape[1] < 1:
            raise UserError(KEY, tuple(scores_BD.shape), "activation scores must be [B, D] with D >= 1")
        return scores_BD[:, 0].to(torch.float64)

    def projected(self, features_NLd: Tensor) -> Tensor:
        """Features as the workers project them, on the directions as they are now: ``[N, D]``, float64."""
        return project(features_NLd, self.directions_DLd)

    def remember(self, view: BatchView, order_B: Tensor, keep: int) -> None:
        """Keep the batch's features for ``rescored``.

        Args:
            order_B: The rows in the order in which the gate took their scores.
            keep: How many of the newest rollouts to keep.
        """
        if view.features_BLd is None:
            raise UserError(KEY, self.name, "the batch has no features; the worker must hand them over")
        self.buffer.take(view.features_BLd[order_B], keep)

    def rescored(self) -> Tensor | None:
        """Scores [N], float64, of what is remembered under the direction as it is now; ``None`` where they are known.

        The rollouts' features stay those of the model that was read when they were sampled.
        """
        features_NLd, stale, self.buffer.stale = self.buffer.features_NLd, self.buffer.stale, False
        return self.projected(features_NLd)[:, 0] if stale and features_NLd is not None else None

    def state_dict(self) -> dict[str, Any]:
        direction = None if self.direction is None else self.direction.to_state()
        state = {**super().state_dict(), "direction": direction, "refresh_cosine": self.refresh_cosine}
        if self.buffer.features_NLd is not None:
            state["buffer"] = self.buffer.to_state()
        if self.bottleneck is not None:
            state |= {"bottleneck": asdict(self.bottleneck), "basis_digest_M": self.basis_digest_M}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            UserError: The state is another detector's, or its layers, hidden size or pairs are not those that this
                detector was fitted with or configured for.
        """
        super().load_state_dict(state)
        _require_same_bottleneck(self.bottleneck, self.basis_digest_M, state)
        saved = None if state["direction"] is None else Direction.from_state(state["direction"])
        if saved is not None and self.direction is not None:
            _require_same(self.direction, saved)
        given = self.config.layers if self.bottleneck is None else None
        if saved is not None and given is not None and saved.layers != given:
            fix = f"the run was started with layers {list(saved.layers)}; set these or start a new run"
            raise UserError(f"{KEY}.layers", list(given), fix)
        self.direction, self.refresh_cosine = saved, state["refresh_cosine"]
        self.buffer = FeatureBuffer()
        if "buffer" in state:
            self.buffer.load_state(state["buffer"])

    def _fitted(self) -> Direction:
        if self.direction is None:
            raise UserError(KEY, self.name, "the detector has no direction yet; call fit, or load a state that has one")
        return self.direction


def _require_same(now: Direction, before: Direction) -> None:
    """Refuse a direction of other layers, hidden size or pairs than ``before``. Raises ``UserError``."""
    for field, key in (("layers", f"{KEY}.layers"), ("hidden_size", f"{KEY} hidden size")):
        here, there = getattr(now, field), getattr(before, field)
        if here != there:
            raise UserError(key, here, f"the run was started with {there}; set the same or start a new run")
    require_same_hash("of the direction", now.pairs_hash, before.pairs_hash)


def _require_same_bottleneck(now: Bottleneck | None, digest_M: Tensor | None, state: Mapping[str, Any]) -> None:
    """Refuse a state whose direction lies in other coordinates. Raises ``UserError``."""
    here = {} if now is None else asdict(now)
    there = state.get("bottleneck") or {}
    keys = {"basis": "coordinates", "seed": "basis_seed"}
    for field in ("basis", "layers", "targets", "rank", "seed"):
        if here.get(field, RESIDUAL) != there.get(field, RESIDUAL):
            fix = f"the run was started with {there.get(field, RESIDUAL)!r}; set the same or start a new run"
            raise UserError(f"{KEY}.{keys.get(field, field)}", here.get(field, RESIDUAL), fix)
    before_M = state.get("basis_digest_M")
    if digest_M is not None and before_M is not None and not torch.allclose(digest_M, before_M, rtol=1e-3, atol=1e-4):
        fix = (
            "these are not the coordinates that the run was started with: the base model's weights differ; restore them"
        )
        raise UserError(f"{KEY} basis digest", float(digest_M.sum()), fix)
