"""What an intervention is: what happens to a rollout once its score and the gate's verdict on it are known.

Shapes: B rollouts, R response tokens.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from verl_grad_routing.registry import Registry
from verl_grad_routing.routing import DEFAULT, Route, RoutingTable

if TYPE_CHECKING:  # detectors and interventions do not know each other when they run
    from verl_grad_routing.detectors import Detector


@dataclass(frozen=True, eq=False)
class Judged:
    """A batch as detector and gate left it.

    Attributes:
        scores_B: Scores, float64; higher is more like the unwanted behaviour.
        routes_B: The gate's decision, int64 values of ``Route``.
        uids: Prompt group of each rollout.
        rewards_B: The proxy reward of each rollout, before any intervention.
        quarantine_off_B: Whether it was sampled with the quarantine off (bool); ``None`` where none was.
        token_routes: Of every rollout the routes [R] of its response tokens, int64; ``None`` where routes are of
            rollouts. ``routes_B`` is then the route of all other positions, and the verdict on the rollout.
    """

    scores_B: Tensor
    routes_B: Tensor
    uids: tuple[str, ...]
    rewards_B: Tensor | None = None
    quarantine_off_B: Tensor | None = None
    token_routes: tuple[Tensor, ...] | None = None

    @property
    def flagged_B(self) -> Tensor:
        """Whether the gate took the rollout for the unwanted behaviour (bool)."""
        return self.routes_B == int(Route.ROUTE)


class Intervention(ABC):
    """Acts on a batch. A subclass has a frozen dataclass ``Config`` and is registered in ``INTERVENTIONS``.

    In a step, ``rejected`` comes first, then ``rewards``, then verl's own advantage estimator over what is not
    rejected, then ``advantages``. What a subclass does not override costs nothing.

    Class attributes:
        uses_routes: The gate's routes reach the engine; otherwise every rollout trains both blocks (ABSORB).
        takes_token_routes: A gate may give every token a route of its own.
        needs_groups: It compares the rollouts of a prompt, so there must be at least two.
        needs_verdicts: It does nothing, or the same to all, where a detector cannot tell rollouts apart.
        variants: Settings under which it is another method, by name, for the table of combinations.
    """

    name: ClassVar[str] = ""  # set by the registry
    uses_routes: ClassVar[bool] = False
    takes_token_routes: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False
    needs_verdicts: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}
    Config: ClassVar[type]

    def __init__(self, config: Any):
        self.config = config

    @property
    def token_weights_V(self) -> Tensor | None:
        """Weights [V] in [0, 1] of the vocabulary's tokens, where ROUTE acts on some tokens less than on others.

        At a position with this route where a token of weight w is predicted a factor a of ``activation_gradient`` is
        a (1 - w) + w; the factors of other routes stay as they are.
        """
        return None

    def works_with(self, detector: type[Detector]) -> str | None:
        """Why it makes no sense with detectors of this class, in one clause; ``None`` where it does.

        The rule of the table of combinations, and of what is refused before a run starts.
        """
        if self.needs_verdicts and not detector.tells_apart:
            return "the detector gives every rollout the same score, so none is told from another"

    def verdicts(self, judged: Judged) -> Tensor:
        """The rollouts [B] (bool) that it takes for the unwanted behaviour; for metrics alone."""
        return judged.flagged_B

    @property
    def table(self) -> RoutingTable:
        """What each route means for the two blocks: forward gates and update masks."""
        return DEFAULT

    def table_at(self, step: int) -> RoutingTable:
        """The table in force at global step ``step`` (1 for the first); a schedule overrides this."""
        del step
        return self.table

    def quarantine_off_table_at(self, step: int) -> RoutingTable:
        """``table_at`` for rollouts that were sampled with the quarantine off.

        They are trained as they were sampled: the quarantine is absent, and what would train it alone trains nothing.
        """
        return self.table_at(step).without_quarantine()

    def rejected(self, judged: Judged) -> Tensor | None:
        """Rollouts [B] (bool) that are taken out of the step: no advantage, no response mask, not in their group."""
        del judged

    def rewards(self, rewards_B: Tensor, judged: Judged) -> Tensor:
        """Rewards [B] to train on, from the proxy rewards. The input is not modified in place."""
        del judged
        return rewards_B

    def observe(self, step: int, measures: Mapping[str, float]) -> None:
        """What has been measured in ``step``, for schedules: ``flagged`` and ``reward``, the gate's verdicts and mean
        proxy reward of its rollouts, and after a validation of the quarantine alone ``swapped_reward``."""
        del step, measures

    def report(self, step: int) -> dict[str, float]:
        """Metrics of the intervention's own, by their full names."""
        del step
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        del state

    def advantages(self, advantages_BR: Tensor, judged: Judged) -> Tensor:
        """Advantages [B, R] to train on, zero-padded on the right. The input is not modified in place."""
        del judged
        return advantages_BR


INTERVENTIONS: Registry[Intervention] = Registry("intervention")
