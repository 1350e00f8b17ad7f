"""One assertion per place where this package reaches into verl."""

from __future__ import annotations

import importlib
import inspect
import operator

import pytest

from verl_grad_routing.doctor.checks import Status
from verl_grad_routing.doctor.seams import SEAMS, Seam, seam_checks, seam_problem


@pytest.mark.parametrize("seam", SEAMS, ids=str)
def test_seam_is_as_expected(seam: Seam) -> None:
    assert seam_problem(seam) is None


@pytest.mark.parametrize("seam", SEAMS, ids=str)
@pytest.mark.timeout(300)
def test_source_tells_the_same_as_the_imported_object(seam: Seam) -> None:
    """What is read from the source holds for the object that a run gets, decorators and all."""
    found = operator.attrgetter(seam.name)(importlib.import_module(seam.module))
    if seam.parameters is None:
        assert not inspect.isfunction(found)
        return
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(inspect.unwrap(found)).parameters.values()
    names = [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]
    bound = ["cls"] if inspect.ismethod(found) else []
    assert tuple(bound + names) == seam.parameters


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "room",
    ["engine", "worker", "replay", "inoculation"]
    + [
        f"trainer.{room}"
        for room in ("core", "sampling", "scoring", "learning", "comparing", "validation", "confessing")
    ],
)
def test_every_override_of_ours_is_written_down(room: str) -> None:
    ours = importlib.import_module(f"verl_grad_routing.training.{room}")
    written = {str(seam) for seam in SEAMS}
    missing = set()
    for cls in vars(ours).values():
        if not (inspect.isclass(cls) and cls.__module__ == ours.__name__):
            continue
        for name in (name for name, value in vars(cls).items() if inspect.isfunction(value) and name[:2] != "__"):
            owner = next((base for base in cls.__mro__[1:] if name in vars(base)), object)
            seam = f"{owner.__module__}.{owner.__name__}.{name}"
            if owner.__module__.startswith("verl.") and seam not in written:
                missing.add(seam)
    assert not missing


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (Seam("verl.no_such_module", "f", ()), "its module is missing"),
        (Seam("no_such_package", "f", ()), "its module is missing"),
        (Seam("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.no_such_method", ("self",)), "missing"),
        (Seam("verl.trainer.ppo.v1.trainer_base", "register_trainer", ("name", "more")), "parameters are (name)"),
        (Seam("verl.trainer.ppo.v1.trainer_base", "register_trainer", None), "parameters are (name)"),
        (Seam("verl.trainer.ppo.v1.trainer_base", "TRAINER_REGISTRY", ("self",)), "no function"),
    ],
)
def test_a_broken_seam_is_found(seam: Seam, problem: str) -> None:
    assert problem in (seam_problem(seam) or "")
    (check,) = seam_checks((seam,))
    assert check.status is Status.FAIL
    assert check.name == str(seam)
    assert "pip install" in check.fix
