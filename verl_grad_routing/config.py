"""The configuration key ``grad_routing``, typed: what a preset may say, checked before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import build_config, load_external_methods
from verl_grad_routing.routing.dense.units import UnitsConfig


@dataclass(frozen=True)
class BlocksConfig:
    """The two blocks of parameters.

    Attributes:
        enabled: Install both blocks and the routed kernel; ``False`` is stock verl (preset ``off``).
        kind: What the blocks are made of: ``adapters``, or ``dense``, units of the base model itself.
        units: Of ``dense``: which units are the quarantine. The others below it but the clip norms,
            ``ablate_at_deployment`` and ``hooks`` are of ``adapters``.
        deployed_rank: Rank of the deployed block.
        quarantine_rank: Rank of the quarantine block; equal by default, or a comparison measures size.
        init: Name of the initialisation of the A rows (``routing.INITIALISATIONS``); B starts at 0.
        seed: Seed of the initialisation.
        clip_norm_deployed: Gradient norm limit of the deployed block; ``None`` takes ``actor.optim.clip_grad``.
        clip_norm_quarantine: The same of the quarantine block.
        ablate_at_deployment: Deployment deletes the quarantine; ``False`` (preset ``vanilla_2r``) keeps both.
        hooks: Engine hooks by name, each with its settings: ``[{name: ..., ...}]``.
    """

    enabled: bool = True
    kind: str = "adapters"
    units: UnitsConfig = field(default_factory=UnitsConfig, metadata={"config": UnitsConfig})
    deployed_rank: int = 8
    quarantine_rank: int = 8
    init: str = "random_orthogonal"
    seed: int = 0
    clip_norm_deployed: float | None = None
    clip_norm_quarantine: float | None = None
    ablate_at_deployment: bool = True
    hooks: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key in ("deployed_rank", "quarantine_rank"):
            rank = getattr(self, key)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(key, rank, "give a whole number of at least 1")
        for key in ("clip_norm_deployed", "clip_norm_quarantine"):
            limit = getattr(self, key)
            if limit is not None and not limit > 0:
                raise UserError(key, limit, "give a positive norm, or null for actor.optim.clip_grad")

    @property
    def total_rank(self) -> int:
        return self.deployed_rank + self.quarantine_rank


@dataclass(frozen=True)
class HardwareConfig:
    """What ``+grad_routing/hardware=cpu`` sets: training ranks on the node."""

    ranks: int = 1


@dataclass(frozen=True)
class EnvironmentConfig:
    """What ``+grad_routing/environment=...`` sets: the name, the folder that ``vgr prepare`` wrote, its pairs.

    ``monitor_rules`` are those of a weak monitor: they know what the pairs know and nothing else. ``probe_layers`` is
    how many layers of the environment's own model carry a gradient probe; ``None`` leaves it to the preset.
    """

    name: str = ""
    dir: str = ""
    pairs: str = ""
    monitor_rules: tuple[str, ...] = ()
    probe_layers: int | None = None


@dataclass(frozen=True)
class GradRoutingConfig:
    """Everything under ``grad_routing``.

    Attributes:
        preset: Name of the preset, for tables and file names.
        control: Must be true for a detector that reads the grader's truth.
        blocks: The two blocks.
        detector: ``name`` and settings of a detector (``vgr list detectors``).
        gate: ``name`` and settings of a gate (``vgr list gates``).
        intervention: ``name`` and settings of an intervention (``vgr list interventions``).
        seed: Seed of the random draws of detectors.
        quarantine_off_share: Share of training rollouts sampled with the quarantine ablated.
        validate_swapped: Control: also validate with the deployed block ablated instead of the quarantine.
        rollout_timeout_s: Seconds without one finished rollout after which the run ends with an error.
        record_dir: Folder that receives every training batch, for replay; ``None`` records nothing.
        replay_dir: Folder of recorded batches to train on instead of fresh rollouts.
        hardware: See ``HardwareConfig``.
        environment: See ``EnvironmentConfig``.
    """

    preset: str = "custom"
    control: bool = False
    blocks: BlocksConfig = field(default_factory=BlocksConfig, metadata={"config": BlocksConfig})
    detector: Mapping[str, Any] = field(default_factory=lambda: {"name": "constant"})
    gate: Mapping[str, Any] = field(default_factory=lambda: {"name": "absorb_all"})
    intervention: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    seed: int = 0
    quarantine_off_share: float = 0.0
    validate_swapped: bool = False
    rollout_timeout_s: float = 600.0
    record_dir: str | None = None
    replay_dir: str | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig, metadata={"config": HardwareConfig})
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig, metadata={"config": EnvironmentConfig})

    def __post_init__(self) -> None:
        if self.quarantine_off_share != 0.0:
            raise UserError("quarantine_off_share", self.quarantine_off_share, "only 0.0 is supported in this version")
        if not self.rollout_timeout_s > 0:
            raise UserError("rollout_timeout_s", self.rollout_timeout_s, "give a positive number of seconds")
        if self.record_dir and self.replay_dir:
            raise UserError("replay_dir", self.replay_dir, "a run either records or replays; unset record_dir")


def parse(settings: Mapping[str, Any]) -> GradRoutingConfig:
    """The typed configuration of a plain mapping. Raises ``UserError`` for unknown keys and bad values."""
    return build_config(GradRoutingConfig, settings, "grad_routing")


@dataclass(frozen=True)
class Methods:
    """The three parts of a method, built: a detector, a gate, an intervention."""

    detector: Any
    gate: Any
    intervention: Any


def build_methods(config: GradRoutingConfig) -> Methods:
    """Build detector, gate and intervention, those of other packages included.

    Raises:
        UserError: An unknown name or key, a bad value, or a detector that reads the truth in a run that is no control.
    """
    from verl_grad_routing.detectors import DETECTORS
    from verl_grad_routing.gates import GATES
    from verl_grad_routing.interventions import INTERVENTIONS

    load_external_methods()
    detector = DETECTORS.build(config.detector, "grad_routing.detector")
    if detector.knows_everything and not config.control:
        fix = "this detector reads the grader's truth; a run that uses it is a control: set grad_routing.control=true"
        raise UserError("grad_routing.detector.name", config.detector["name"], fix)
    gate = GATES.build(config.gate, "grad_routing.gate")
    return Methods(detector, gate, INTERVENTIONS.build(config.intervention, "grad_routing.intervention"))
