"""What a method that starts before RL asks of the model that the run starts from."""

from __future__ import annotations

from pathlib import Path

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run


def card(run: Run) -> None:
    """The model went through the warm-up that the preset is about, or the run shows nothing of it."""
    name = run.settings.warm_up_card
    model = run.get("actor_rollout_ref.model.path")
    if name is None or (Path(str(model)).expanduser() / name).is_file():
        return
    fix = f"has no {name}: give the folder that the warm-up wrote (`vgr self-report train MODEL --to FOLDER`)"
    control = "grad_routing.warm_up_card=null for the control without it"
    raise UserError("actor_rollout_ref.model.path", model, f"{fix}, or set {control}")
