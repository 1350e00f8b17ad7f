"""The rows of ``vgr bench routing`` are set up as the presets are."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((resources.files("verl_grad_routing") / "conf" / "grad_routing" / f"{name}.yaml").read_text())


def test_units_and_factors_are_the_presets() -> None:
    from verl_grad_routing.bench import routing_rows as rows

    def units(name: str) -> dict[str, Any]:
        given = preset(name)["grad_routing"]["blocks"]["units"]
        return {key: value for key, value in given.items() if value is not None}

    assert units("sgtm") == rows.UNITS and units("cloud") == rows.CLOUD_UNITS
    assert units("era") == {"mlp_units": "expanded"}  # the rest is cloud's

    def optim(name: str) -> dict[str, Any]:
        return preset(name)["grad_routing"]["blocks"]["optim"]

    assert (optim("sgtm"), optim("strict")) == (rows.SGTM_OPTIM, rows.STRICT_OPTIM)
    assert all(optim(name) == rows.TO_START for name in ("pissa", "corda", "scorda"))
    assert (optim("cloud"), optim("era")) == (rows.CLOUD_OPTIM, rows.ERA_OPTIM)
    for name in ("sgtm", "era"):
        assert preset(name)["grad_routing"]["blocks"]["clip_norm_deployed"] == float("inf")
    intervention = preset("cloud")["grad_routing"]["intervention"]
    assert intervention["alpha"] == rows.CLOUD["alpha"] and intervention["off_target"] == 1.0
    assert preset("era")["grad_routing"]["intervention"]["alpha"] == rows.ERA["alpha"]


def test_every_way_to_route_has_a_row_with_its_bound() -> None:
    from verl_grad_routing.bench.routing_rows import ROWS, register_row

    bounds = {name: row.bound for name, row in ROWS.items()}
    dense = {"sgtm", "cloud", "cloud, token weights", "era"}
    adapters = {"persona", "strict", "pissa", "corda", "scorda", "decay_to_start", "persona_token"}
    adapters |= {"two_sided", "antipasto"}
    assert bounds == dict.fromkeys(adapters, 1.03) | dict.fromkeys(dense, 1.05) | {"persona_grad": 1.1}
    with pytest.raises(UserError, match="already registered"):
        register_row("persona", ROWS["strict"])
