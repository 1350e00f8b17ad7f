"""The configuration key ``grad_routing``, typed: what a preset may say, checked before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verl_grad_routing.confessions.settings import ConfessionsConfig
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import build_config, load_external_methods
from verl_grad_routing.routing.dense.units import UnitsConfig

MEANS = ("batch", "own_tokens", "own_rollouts")
BLOCKS, SHARED = ("deployed", "quarantine"), "shared"


@dataclass(frozen=True)
class BlockOptimConfig:
    """How the blocks are optimised, where that is not as ``actor.optim`` says for both.

    Attributes:
        lr_ratio_quarantine: The quarantine's learning rate in units of the deployed block's, schedule included.
        betas_deployed: Adam's betas of the deployed block; ``None`` takes ``actor.optim.betas``.
        betas_quarantine: The same of the quarantine.
        betas_shared: The same of what belongs to neither block (``units.shared``), which dense blocks alone have.
        weight_decay_deployed: Decoupled weight decay; ``None`` takes ``actor.optim.weight_decay``.
        weight_decay_quarantine: The same of the quarantine.
        weight_decay_shared: The same of what belongs to neither block.
        decay_to_start: Decay towards the starting weights, ``p -= lr λ (p - p₀)``, instead of towards zero.
        clip_jointly: One norm over both blocks under ``actor.optim.clip_grad``, as in most of the literature, instead
            of a norm for each.
        mean_over: What a block's gradient averages over: ``batch``, the whole mini-batch (its own part's mean times
            M / N), or its own part alone, counted in tokens (with token-mean losses) or in rollouts (with seq-mean).
        freeze_inactive: A block that no token of a mini-batch trains is not stepped: its weights and its optimizer
            state stay as they are. ``False`` steps it with a gradient of zero, so that momentum and decay move it, as
            in the papers' code (SGTM's default optimizer, Cloud et al.'s single Adam).
    """

    lr_ratio_quarantine: float = 1.0
    betas_deployed: tuple[float, float] | None = None
    betas_quarantine: tuple[float, float] | None = None
    betas_shared: tuple[float, float] | None = None
    weight_decay_deployed: float | None = None
    weight_decay_quarantine: float | None = None
    weight_decay_shared: float | None = None
    decay_to_start: bool = False
    clip_jointly: bool = False
    mean_over: str = "batch"
    freeze_inactive: bool = True

    def __post_init__(self) -> None:
        if not (_is_number(self.lr_ratio_quarantine) and 0 < self.lr_ratio_quarantine < float("inf")):
            raise UserError("lr_ratio_quarantine", self.lr_ratio_quarantine, "give a positive number")
        for block in (*BLOCKS, SHARED):
            key, betas = f"betas_{block}", getattr(self, f"betas_{block}")
            if betas is not None:
                pair = isinstance(betas, (list, tuple)) and len(betas) == 2
                if not (pair and all(_is_number(b) and 0 <= b < 1 for b in betas)):
                    raise UserError(key, betas, "give two numbers in [0, 1), or null for actor.optim.betas")
                object.__setattr__(self, key, tuple(betas))
            key, decay = f"weight_decay_{block}", getattr(self, f"weight_decay_{block}")
            if decay is not None and not (_is_number(decay) and decay >= 0):
                raise UserError(key, decay, "give a number of at least 0, or null for actor.optim.weight_decay")
        for key in ("decay_to_start", "clip_jointly", "freeze_inactive"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(key, getattr(self, key), "give true or false")
        if self.mean_over not in MEANS:
            raise UserError("mean_over", self.mean_over, f"known: {', '.join(MEANS)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class BlocksConfig:
    """The two blocks of parameters.

    Attributes:
        enabled: Install both blocks and the routed kernel; ``False`` is stock verl (preset ``off``).
        kind: What the blocks are made of: ``adapters``, or ``dense``, units of the base model itself.
        units: Of ``dense``: which units are the quarantine. The others below it but the clip norms, ``optim`` and
            ``ablate_at_deployment`` are of ``adapters``.
        deployed_rank: Rank of the deployed block.
        quarantine_rank: Rank of the quarantine block; equal by default, or a comparison measures size.
        init: Name of the initialisation of the A rows (``routing.INITIALISATIONS``); B starts at 0.
        form: What a block keeps of each layer (``routing.FORMS``): ``lora``, ``two_sided``, ``antipasto``.
        seed: Seed of the initialisation.
        contrast: File that ``vgr contrast`` wrote, for an ``init`` that reads pairs; ``None`` for all others.
        clip_norm_deployed: Gradient norm limit of the deployed block; ``None`` takes ``actor.optim.clip_grad``.
        clip_norm_quarantine: The same of the quarantine block.
        ablate_at_deployment: Deployment deletes the quarantine; ``False`` (preset ``vanilla_2r``) keeps both.
        optim: See ``BlockOptimConfig``.
        hooks: Engine hooks by name, each with its settings: ``[{name: ..., ...}]``.
    """

    enabled: bool = True
    kind: str = "adapters"
    units: UnitsConfig = field(default_factory=UnitsConfig, metadata={"config": UnitsConfig})
    deployed_rank: int = 8
    quarantine_rank: int = 8
    init: str = "random_orthogonal"
    form: str = "lora"
    seed: int = 0
    contrast: str | None = None
    clip_norm_deployed: float | None = None
    clip_norm_quarantine: float | None = None
    ablate_at_deployment: bool = True
    optim: BlockOptimConfig = field(default_factory=BlockOptimConfig, metadata={"config": BlockOptimConfig})
    hooks: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key in ("deployed_rank", "quarantine_rank"):
            rank = getattr(self, key)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(key, rank, "give a whole number of at least 1")
        if self.form != "lora" and not self.enabled:
            raise UserError("form", self.form, "there are no blocks (blocks.enabled=false); leave lora")
        for key in ("clip_norm_deployed", "clip_norm_quarantine"):
            limit = getattr(self, key)
            if limit is not None and not limit > 0:
                raise UserError(key, limit, "give a positive norm, or null for actor.optim.clip_grad")
            if limit is not None and self.optim.clip_jointly:
                raise UserError(key, limit, "blocks are clipped jointly; unset it, or set optim.clip_jointly=false")
        for key in (f"betas_{SHARED}", f"weight_decay_{SHARED}"):
            value = getattr(self.optim, key)
            if value is not None and self.kind == "adapters":
                raise UserError(f"optim.{key}", value, "adapters share nothing between the blocks; set null")

    @property
    def total_rank(self) -> int:
        return self.deployed_rank + self.quarantine_rank

    @property
    def adapter_rank(self) -> int:
        """Rank of the plain adapter that both blocks are for the rollout. Raises ``UserError`` for an unknown form."""
        from verl_grad_routing.routing import get_form  # imports torch

        return self.total_rank * get_form(self.form).sides


@dataclass(frozen=True)
class HardwareConfig:
    """What ``+grad_routing/hardware=cpu`` sets: training ranks on the node."""

    ranks: int = 1


@dataclass(frozen=True)
class EnvironmentConfig:
    """What ``+grad_routing/environment=...`` sets: the name, the folder that ``vgr prepare`` wrote, its pairs.

    ``monitor_rules`` or ``monitor_judge`` are a weak monitor's: it knows what the pairs know and nothing else.
    ``probe_layers`` is how many layers of the environment's own model carry a gradient probe; ``None`` leaves it to the
    preset.
    ``held_out_monitor`` and ``inoculation`` are what the presets take for the settings of that name, the
    ``confession_*`` form, length and judge of its model's confessions. ``report_format`` is the form of what its model
    is asked after self-report training.
    """

    name: str = ""
    dir: str = ""
    pairs: str = ""
    monitor_rules: tuple[str, ...] | None = None
    monitor_judge: str | None = None
    probe_layers: int | None = None
    held_out_monitor: Mapping[str, Any] | None = None
    inoculation: Mapping[str, Any] | None = None
    confession_format: str = "schema"
    confession_tokens: int = 512
    confession_judge: str | None = None
    report_format: str = "question_chat"


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
        held_out_monitor: ``name`` and settings of a detector that reads texts and whose verdicts are only logged.
        confessions: Confessions after some answers, see ``ConfessionsConfig``; off by default.
        warm_up_card: File that the model's folder must hold, as the card of a warm-up; ``None`` for any model.
        seed: Seed of the random draws of detectors.
        trusted_column: Column of the dataset, or ``extra_info.<key>``, whose true rows are trusted to be clean.
        quarantine_off_share: Share of training rollouts sampled with the quarantine ablated, in [0, 1).
        quarantine_off_unit: What that share is of: whole prompt groups (``prompt``), or each prompt's ``rollout``s.
        quarantine_off_by: How they are sampled: after a second weight sync within the step (``sync``), or beside the
            others by a second adapter that their requests name (``request``; rollout ``vllm_two_adapters``).
        quarantine_off_advantages: The two kinds of a prompt's rollouts are one group of the advantage (``together``) or
            two (``apart``); whole prompt groups hold one kind alone.
        validate_swapped: Control: also validate with the deployed block ablated instead of the quarantine.
        rollout_timeout_s: Seconds without one finished rollout after which the run ends with an error.
        record_dir: Folder that receives every training batch, for replay; ``None`` records nothing.
        replay_dir: Folder of recorded batches to train on instead of fresh rollouts.
        compare: Methods that score the same rollouts in shadow (``shadows.build_shadows``): names or mappings.
        compare_gradients_every: Steps between comparisons of the gradients that they would have produced; 0: never.
        hardware: See ``HardwareConfig``.
        environment: See ``EnvironmentConfig``.
    """

    preset: str = "custom"
    control: bool = False
    blocks: BlocksConfig = field(default_factory=BlocksConfig, metadata={"config": BlocksConfig})
    detector: Mapping[str, Any] = field(default_factory=lambda: {"name": "constant"})
    gate: Mapping[str, Any] = field(default_factory=lambda: {"name": "absorb_all"})
    intervention: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    held_out_monitor: Mapping[str, Any] | None = None
    confessions: ConfessionsConfig = field(default_factory=ConfessionsConfig, metadata={"config": ConfessionsConfig})
    warm_up_card: str | None = None
    seed: int = 0
    trusted_column: str | None = None
    quarantine_off_share: float = 0.0
    quarantine_off_unit: str = "prompt"
    quarantine_off_by: str = "sync"
    quarantine_off_advantages: str = "apart"
    validate_swapped: bool = False
    rollout_timeout_s: float = 600.0
    record_dir: str | None = None
    replay_dir: str | None = None
    compare: tuple[Any, ...] = ()
    compare_gradients_every: int = 0
    hardware: HardwareConfig = field(default_factory=HardwareConfig, metadata={"config": HardwareConfig})
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig, metadata={"config": EnvironmentConfig})

    def __post_init__(self) -> None:
        if self.trusted_column is not None and (not isinstance(self.trusted_column, str) or not self.trusted_column):
            raise UserError("trusted_column", self.trusted_column, "give a column's name, extra_info.<key>, or null")
        share = self.quarantine_off_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise UserError("quarantine_off_share", share, "give a share in [0, 1); 0 samples all with both blocks")
        for key, allowed in (
            ("quarantine_off_unit", ("prompt", "rollout")),
            ("quarantine_off_by", ("sync", "request")),
            ("quarantine_off_advantages", ("apart", "together")),
        ):
            if getattr(self, key) not in allowed:
                raise UserError(key, getattr(self, key), f"give {' or '.join(allowed)}")
        if share and not self.blocks.enabled:
            fix = "there is no quarantine to switch off (blocks.enabled=false); set 0.0"
            raise UserError("quarantine_off_share", share, fix)
        if share and not self.blocks.ablate_at_deployment:
            fix = "blocks.ablate_at_deployment=false deploys both blocks, so no rollout is sampled without one; set 0.0"
            raise UserError("quarantine_off_share", share, fix)
        if not self.rollout_timeout_s > 0:
            raise UserError("rollout_timeout_s", self.rollout_timeout_s, "give a positive number of seconds")
        if self.record_dir and self.replay_dir:
            raise UserError("replay_dir", self.replay_dir, "a run either records or replays; unset record_dir")
        every = self.compare_gradients_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise UserError("compare_gradients_every", every, "give a whole number of steps, 0 for never")


def parse(settings: Mapping[str, Any]) -> GradRoutingConfig:
    """The typed configuration of a plain mapping. Raises ``UserError`` for unknown keys and bad values."""
    return build_config(GradRoutingConfig, settings, "grad_routing")


@dataclass(frozen=True)
class Methods:
    """The three parts of a method, built: a detector, a gate, an intervention; and the monitor that only watches."""

    detector: Any
    gate: Any
    intervention: Any
    held_out: Any = None


def build_methods(config: GradRoutingConfig) -> Methods:
    """Build detector, gate and intervention, those of other packages included.

    Raises:
        UserError: An unknown name or key, a bad value, or a detector that reads the truth in a run that is no control.
    """
    parts = {"detector": config.detector, "gate": config.gate, "intervention": config.intervention}
    methods = build_parts(parts, config.control, "grad_routing")
    return replace(methods, held_out=_held_out(config, methods.detector))


def build_parts(parts: Mapping[str, Mapping[str, Any]], control: bool, where: str) -> Methods:
    """As ``build_methods``, from the settings of the three parts; ``where`` is the configuration key above them."""
    from verl_grad_routing.detectors import DETECTORS
    from verl_grad_routing.gates import GATES
    from verl_grad_routing.interventions import INTERVENTIONS

    load_external_methods()
    detector = DETECTORS.build(parts["detector"], f"{where}.detector")
    if detector.knows_everything and not control:
        fix = f"this detector reads the grader's truth; a run that uses it is a control: set {where}.control=true"
        raise UserError(f"{where}.detector.name", parts["detector"]["name"], fix)
    gate = GATES.build(parts["gate"], f"{where}.gate")
    return Methods(detector, gate, INTERVENTIONS.build(parts["intervention"], f"{where}.intervention"))


def _held_out(config: GradRoutingConfig, detector: Any) -> Any:
    from verl_grad_routing.detectors import DETECTORS
    from verl_grad_routing.detectors.held_out import KEY, require_text_reader

    if config.held_out_monitor is None:
        return None
    monitor = DETECTORS.build(config.held_out_monitor, KEY)
    require_text_reader(monitor)
    if (monitor.name, monitor.config) == (detector.name, detector.config):
        fix = "this is the detector of the training itself; give another monitor"
        raise UserError(KEY, dict(config.held_out_monitor), fix)
    return monitor
