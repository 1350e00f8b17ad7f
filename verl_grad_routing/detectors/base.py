"""What a detector is and what it may see.

A detector gives every rollout of a batch one real number, higher when the rollout is more like the unwanted behaviour.
It declares the *signal* it reads; ``view_for`` removes everything else from the batch before the detector sees it, so
that the facts that only the grader knows cannot reach the routing of a method that claims not to use them.

Shapes: B rollouts of the batch (real rows only, in the driver's order), D directions, F length of a fingerprint.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import Registry


class Signal(str, Enum):
    """Where a detector's knowledge comes from."""

    none = "none"  # nothing: constants and random numbers
    pairs = "pairs"  # contrastive text pairs, written before the run
    clean_data = "clean_data"  # examples of wanted behaviour
    reward = "reward"  # the proxy reward that the policy is trained on
    monitor = "monitor"  # a weak judge that reads prompts and responses
    labels = "labels"  # partial or noisy truth about rollouts
    oracle = "oracle"  # the full truth about rollouts: a control only

    def __str__(self) -> str:
        return self.value


# The fields of a BatchView that only some signals may read. Everything else of the view is open to all.
READABLE: dict[Signal, frozenset[str]] = {
    Signal.none: frozenset(),
    Signal.pairs: frozenset(),
    Signal.clean_data: frozenset(),
    Signal.reward: frozenset({"proxy_reward_B"}),
    Signal.monitor: frozenset({"prompts", "responses"}),
    Signal.labels: frozenset({"facts", "types"}),
    Signal.oracle: frozenset({"facts", "types"}),
}
GUARDED: frozenset[str] = frozenset().union(*READABLE.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchView:
    """What is known about the rollouts of one step.

    Attributes:
        keys: Unique rollout ids [B].
        uids: Prompt group of each rollout [B].
        names: What each rollout is called in every run of the same data [B], for draws that are the same in each.
        prompt_names: The same for prompts [B].
        step: Global step, 1 for the first.
        seed: Seed of the run.
        activation_scores_BD: Projection of each rollout's pooled activation, or of its gradient, on each of the
            detector's D directions.
        features_BLd: What these projections are of, where the gate scores its history again: the pooled activations, or
            the coordinates of the gradients.
        activation_token_scores: Of each rollout the projection [R] of every response token's activation on the
            detector's first direction.
        response_masks: Of each rollout which response tokens [R] count, 0 for what tools wrote.
        fingerprints_BF: Projected gradient of the detector's frozen probe; zeros for a rollout not fingerprinted.
        proxy_reward_B: The reward that the policy is trained on.
        prompts: Text of each prompt [B].
        responses: Text of each response [B].
        facts: What the grader knows about each rollout, name to tensor [B].
        types: Loophole type of each rollout's prompt, likewise from the grader [B].

    Raises:
        UserError: A field has another number of rows than ``keys``, or a key occurs twice.
    """

    keys: tuple[str, ...]
    uids: tuple[str, ...]
    step: int
    seed: int
    names: tuple[str, ...] | None = None
    prompt_names: tuple[str, ...] | None = None
    activation_scores_BD: Tensor | None = None
    features_BLd: Tensor | None = None
    activation_token_scores: tuple[Tensor, ...] | None = None
    response_masks: tuple[Tensor, ...] | None = None
    fingerprints_BF: Tensor | None = None
    proxy_reward_B: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    responses: tuple[str, ...] | None = None
    facts: Mapping[str, Tensor] | None = None
    types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns.update({f"facts.{name}": column for name, column in (columns.pop("facts") or {}).items()})
        for name, column in columns.items():
            if column is not None and name not in ("step", "seed") and len(column) != len(self.keys):
                raise UserError(f"batch.{name}", len(column), f"give one row for each of the {len(self.keys)} rollouts")
        if len(set(self.keys)) != len(self.keys):
            raise UserError("batch.keys", len(set(self.keys)), f"{len(self.keys)} rollouts need as many different keys")

    @property
    def drawn_by(self) -> tuple[str, ...]:
        """What draws on rollouts go by: their names, or their keys where they have none."""
        return self.keys if self.names is None else self.names

    @property
    def prompts_drawn_by(self) -> tuple[str, ...]:
        """What draws on prompts go by."""
        return self.uids if self.prompt_names is None else self.prompt_names

    def tie_order(self) -> Tensor:
        """All rows, int64 [B], in the order in which a gate sees them and so breaks ties: drawn by seed, step and name.

        verl's own order is that in which answers were finished, which differs between runs and favours short answers.
        """
        drawn = [uniform(self.seed, self.step, name, "tie") for name in self.drawn_by]
        return torch.tensor(sorted(range(len(drawn)), key=drawn.__getitem__), dtype=torch.int64)


class Detector(ABC):
    """Scores rollouts. A subclass has a frozen dataclass ``Config`` and is registered in ``DETECTORS``.

    Class attributes:
        signal: The knowledge that it reads.
        needs_directions: The worker must project pooled activations on this detector's directions
            (then it is an ``ActivationDetector``).
        needs_gradients: Those are directions of gradients, and the worker must project gradients on them
            (then it is a ``GradientDetector``, and ``needs_directions`` too).
        needs_fingerprints: The worker must take gradient fingerprints (then it is a ``FingerprintDetector``).
        scores_tokens: It can score every token of a response too (``token_scores``).
        tells_apart: Its scores can differ between rollouts; one that says no reaches no verdict on any.
        score_range: Least and largest score where the scores are bounded, ``None`` where they are not.
        judges_whole_batch: Its scores compare the rollouts of a batch with each other (a clustering): the one exception
            to the rule of ``score``. Everything else about the rule stands, the order of the rollouts included.
    """

    name: ClassVar[str] = ""  # set by the registry
    signal: ClassVar[Signal]
    needs_directions: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_fingerprints: ClassVar[bool] = False
    scores_tokens: ClassVar[bool] = False
    judges_whole_batch: bool = False
    tells_apart: ClassVar[bool] = True
    score_range: tuple[float, float] | None = None
    Config: ClassVar[type]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def score(self, view: BatchView) -> Tensor:
        """Scores [B], float64, of the rollouts in ``view``; higher is more like the unwanted behaviour.

        A rollout's score may depend on nothing but that rollout, the step and the seed: never on its neighbours, unless
        the class says ``judges_whole_batch``, and never on their order.
        """

    def token_scores(self, view: BatchView) -> tuple[Tensor, ...]:
        """Of every rollout the scores [n], float64, of its n response tokens that count; the rule of ``score`` holds.

        Raises:
            UserError: This detector does not score tokens.
        """
        del view
        raise UserError("grad_routing.detector.name", self.name, "it scores rollouts, not tokens; choose another")

    @property
    def reads(self) -> frozenset[str]:
        """The guarded fields of the view that it may read: its signal's, and what a setting of it adds openly."""
        return READABLE[self.signal]

    def report(self) -> dict[str, float]:
        """Metrics of the last call of ``score``; they may know what the detector knows and nothing else."""
        return {}

    def verdicts(self, view: BatchView, scores_B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which rollouts it has judged and which of all it takes for unwanted (bool [B] each), if it reaches verdicts.

        For metrics: a detector that scores and leaves verdicts to the gate returns ``None``.
        """
        del view, scores_B

    @property
    def knows_everything(self) -> bool:
        """It reads the full truth about rollouts, so a run that uses it is a control."""
        return self.signal is Signal.oracle

    @property
    def pair_means(self) -> tuple[float, float] | None:
        """Mean score of the (unwanted, wanted) sides of the contrastive pairs, where there are pairs."""
        return None

    @property
    def pair_scores(self) -> tuple[Tensor, Tensor] | None:
        """Scores [P], float64, of every pair's (unwanted, wanted) sides, where there are pairs."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to score as this one would: plain values and tensors."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``. Raises ``UserError`` when it comes from another detector."""
        require_same_method("grad_routing.detector.name", self.name, state)


DETECTORS: Registry[Detector] = Registry("detector")


@dataclass(frozen=True)
class NoConfig:
    """Configuration of a method without settings."""


def require_same_method(key: str, name: str, state: Mapping[str, Any]) -> None:
    """Refuse the saved state of another method. Raises ``UserError``."""
    if state.get("name") != name:
        fix = f"the checkpoint was written with {state.get('name')!r}; set the same or start a new run"
        raise UserError(key, name, fix)


def view_for(detector: Detector, full: BatchView) -> BatchView:
    """``full`` without every field that the detector's signal does not allow.

    Facts remain for ``labels`` and ``oracle``, the proxy reward for ``reward``, texts for ``monitor`` (and for a
    detector whose ``reads`` says so), activation scores for detectors that asked for directions, fingerprints for those
    that asked for them.
    """
    hidden = set(GUARDED - detector.reads)
    if not detector.needs_directions:
        hidden |= {"activation_scores_BD", "activation_token_scores", "features_BLd"}
    if not detector.scores_tokens:
        hidden.add("activation_token_scores")
    if not detector.needs_fingerprints:
        hidden.add("fingerprints_BF")
    return dataclasses.replace(full, **dict.fromkeys(hidden))


def checked_scores(detector: Detector, view: BatchView) -> Tensor:
    """Score ``view`` as the detector may see it, and refuse what cannot be routed on.

    Returns:
        Scores [B], float64, on the CPU.

    Raises:
        UserError: The detector returned another shape, or a score that is not finite (names the rollout's key).
    """
    where = f"grad_routing.detector ({detector.name})"
    scores_B = detector.score(view_for(detector, view)).detach().to("cpu", torch.float64)
    if scores_B.shape != (len(view.keys),):
        raise UserError(
            where, tuple(scores_B.shape), f"score must return one number for each of {len(view.keys)} rollouts"
        )
    bad_B = ~torch.isfinite(scores_B)
    if bad_B.any():
        row = int(bad_B.nonzero()[0])
        fix = "scores must be finite; look for inf or NaN in the model's activations"
        raise UserError(f"{where} score of rollout {view.keys[row]} at step {view.step}", float(scores_B[row]), fix)
    return scores_B
