"""Settings of confessions, the key ``grad_routing.confessions``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from verl_grad_routing.errors import UserError

GT_JUDGE = "gt_judge"
"""The judge that reads the grader's facts: a control, and not the paper's."""

MODES = ("sealed", "seal_broken")


@dataclass(frozen=True)
class ConfessionsConfig:
    """Confessions in training and at validation.

    Attributes:
        share: Probability p that a prompt of the step is a confession prompt; 0 trains no confessions.
        per_answer: Confessions m of one answer; they are each other's baseline, so at least 2.
        format: Name in ``FORMATS``: what the model is asked and how its confession is read; ``question_*`` are those
            of ``vgr interrogate``.
        judge: ``package.module:function`` of (prompt, answer, confession), a number in [0, 1]; or ``gt_judge``.
        mode: ``sealed``; ``seal_broken`` also takes ``penalty`` off an answer whose confession admits something.
        penalty: Of ``seal_broken``, in units of the answer's reward.
        weight: Of the confessions' loss beside the answers'; ``None`` is their rows over the answers' in each
            mini-batch, every sample one vote (paper).
        message: What the model is asked (x_c); ``None`` takes the format's.
        role: Role of that message.
        max_tokens: Length limit of a confession, apart from that of answers.
        reasoning_end: Marker that ends a model's reasoning, which no judge sees; ``None``: it has none.
        validate: Ask for one confession of every validation answer.
    """

    share: float = 0.0
    per_answer: int = 2
    format: str = "schema"
    judge: str | None = None
    mode: str = "sealed"
    penalty: float = 1.0
    weight: float | None = None
    message: str | None = None
    role: str = "system"
    max_tokens: int = 512
    reasoning_end: str | None = None
    validate: bool = False

    def __post_init__(self) -> None:
        from verl_grad_routing.confessions.formats import FORMATS
        from verl_grad_routing.directions.checks import require_bool, require_choice, require_int, require_number

        require_number("share", self.share, 0, 1)
        require_int("per_answer", self.per_answer, 2)
        require_choice("format", self.format, tuple(FORMATS))
        require_choice("mode", self.mode, MODES)
        require_number("penalty", self.penalty, 0)
        require_int("max_tokens", self.max_tokens, 1)
        require_bool("validate", self.validate)
        if self.share == 1:
            raise UserError("share", self.share, "no answer would be trained; give less than 1")
        if self.share > 0 and not self.judge:
            raise UserError("judge", self.judge, f"confessions are rewarded by a judge: module:function, or {GT_JUDGE}")
        if self.weight is not None:
            require_number("weight", self.weight, 0)

    @property
    def trains(self) -> bool:
        """Whether steps hold confessions."""
        return self.share > 0

    @property
    def sealed(self) -> bool:
        return self.mode == "sealed"

    @property
    def knows_everything(self) -> bool:
        """The confessions' reward reads the grader's facts, so the run is a control."""
        return self.trains and self.judge == GT_JUDGE

    @property
    def divisor(self) -> int:
        """What the answers of a prompt must be divisible by, so that confessions take exactly their rows."""
        return self.per_answer if self.sealed else 2 * self.per_answer
