"""Which methods ``grad_routing.compare`` names, and one line for everything that cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from verl_grad_routing.config import parse
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.errors import UserError
from verl_grad_routing.presets import preset_names, preset_settings
from verl_grad_routing.shadows import build_shadows
from verl_grad_routing.training.router import Router
from verl_grad_routing.training.shadow_state import load_states, save_states

ENVIRONMENT = {"name": "loopholes", "dir": "d", "pairs": "d/pairs.jsonl", "monitor_rules": ["^1"], "probe_layers": 2}


def built(*entries: Any, environment: dict[str, Any] | None = None) -> dict[str, Any]:
    config = parse({"compare": list(entries), "environment": environment or ENVIRONMENT})
    return {shadow.name: shadow for shadow in build_shadows(config)}


def test_names_are_presets_with_the_runs_environment() -> None:
    found = built("advantage_modification", "random")
    method = found["advantage_modification"].methods
    assert (method.detector.name, method.detector.config.pairs) == ("concept_act", "d/pairs.jsonl")
    assert (method.intervention.name, method.intervention.config.alpha, method.gate.name) == (
        "modify_reward",
        2.0,
        "absorb_all",
    )
    assert found["random"].methods.intervention.name == "route"


def test_a_method_is_its_first_preset() -> None:
    method = built("grift")["grift"].methods
    assert (method.detector.config.rules, method.detector.config.num_layers) == (("^1",), 2)
    assert method.intervention.name == "mask_advantage"


@pytest.mark.parametrize("name", ["leaked_id", "persona_bonus", "caps", "loopholes"])
@pytest.mark.parametrize("method", ["screen", "grift", "monitor_route", "monitor_penalty"])
def test_a_method_has_the_environments_own_monitor(name: str, method: str) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["+grad_routing=persona", f"+grad_routing/environment={name}"])
    settings = OmegaConf.to_container(config.grad_routing.environment, resolve=True)
    found = built(method, environment=settings)[method].methods.detector.config  # type: ignore[arg-type]
    rules = settings["monitor_rules"]  # type: ignore[index]
    assert (found.rules, found.judge) == (rules and tuple(rules), settings.get("monitor_judge"))  # type: ignore[union-attr]
    assert (found.rules is None) != (found.judge is None)


def test_parts_are_merged_or_replaced() -> None:
    other = {"name": "other", "preset": "random", "detector": {"direction_index": 1}, "gate": {"route": 0.5}}
    alone = {"name": "alone", "detector": {"name": "coinflip", "seed": 3}, "intervention": {"name": "screen"}}
    replaced = {"name": "random", "gate": {"name": "threshold", "route_above": 0.0}}
    found = built(other, alone, replaced)
    first, second, third = (found[name].methods for name in ("other", "alone", "random"))
    assert first.detector.config.direction_index == 1 and (first.gate.config.route, first.gate.config.keep) == (
        0.5,
        0.25,
    )
    assert (second.detector.config.seed, second.gate.name, second.intervention.name) == (3, "absorb_all", "screen")
    assert third.gate.config.route_above == 0.0 and third.detector.name == "random"
    assert first.detector is not third.detector and first.gate is not third.gate


BAD = {
    "no list": ("random", "grad_routing.compare='random'", "give a list"),
    "a number": ([3], "grad_routing.compare=3", "give a name"),
    "a path": (["a/b"], "grad_routing.compare='a/b'", "letters"),
    "unknown": (["persona_"], "grad_routing.compare='persona_'", "did you mean 'persona'"),
    "twice": (["random", "random"], "name='random'", "taken"),
    "reserved": ([{"name": "arm", "preset": "random"}], "name='arm'", "taken"),
    "unknown key": ([{"name": "random", "detektor": {}}], "compare.random.detektor", "did you mean 'detector'"),
    "unknown preset": ([{"name": "x", "preset": "randm"}], "compare.x.preset='randm'", "did you mean 'random'"),
    "no detector": ([{"name": "mine", "gate": {}}], "grad_routing.compare='mine'", "no detector"),
    "no mapping": ([{"name": "random", "gate": "otsu"}], "compare.random.gate='otsu'", "mapping"),
    "bad setting": ([{"name": "random", "gate": {"keep": 0.9}}], "compare.random.gate.keep=0.9", "at most"),
    "bad name": ([{"name": "x", "detector": {"name": "lables"}}], "compare.x.detector.name='lables'", "labels"),
    "no verdicts": (["vanilla_2r"], "compare.vanilla_2r='constant'", "no verdict"),
    "hooks alone": (["tdga"], "compare.tdga='constant'", "no verdict"),
    "truth": ([{"name": "x", "detector": {"name": "oracle"}}], "compare.x.detector.name='oracle'", "x.control=true"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_shadow_is_one_line(case: str) -> None:
    compare, key, fix = BAD[case]
    with pytest.raises(UserError) as told:
        build_shadows(parse({"compare": compare, "environment": ENVIRONMENT}))
    assert key in str(told.value) and fix in str(told.value) and "\n" not in str(told.value)


def test_a_value_that_only_an_environment_gives_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"compare.persona.detector.pairs='\?\?\?': this value is required"):
        built("persona", environment={"name": ""})
    assert built("oracle")["oracle"].methods.detector.knows_everything  # its preset says that it is a control


@pytest.mark.parametrize("every", [-1, 1.5, True])
def test_a_bad_interval(every: Any) -> None:
    with pytest.raises(UserError, match=r"grad_routing.compare_gradients_every"):
        parse({"compare_gradients_every": every})


def test_presets_read_without_hydra_are_hydras() -> None:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("verl_grad_routing.conf", version_base=None):
        for preset in preset_names():
            composed = compose(None, [f"+grad_routing={preset}", "+grad_routing/environment=loopholes"])
            whole = OmegaConf.create({"grad_routing": composed.grad_routing})
            expected: Any = OmegaConf.to_container(whole, resolve=True, throw_on_missing=False)
            found = preset_settings(preset, expected["grad_routing"]["environment"])
            for part in ("preset", "control", "blocks", "detector", "gate", "intervention"):
                assert found[part] == expected["grad_routing"][part], (preset, part)


def test_states_go_into_a_file_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def routers() -> dict[str, Router]:
        config = parse({"compare": ["coinflip"]})
        return {shadow.name: Router(config, shadow.methods) for shadow in build_shadows(config)}

    whole = routers()
    gate = whole["coinflip"].gate
    gate.decide(torch.linspace(0, 1, 8, dtype=torch.float64), 1)
    save_states(whole, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["grad_routing_compare.pt"]
    again = routers()
    load_states(again, str(tmp_path))
    kept, held = (router["coinflip"].gate.state_dict() for router in (again, whole))
    assert str(kept) == str(held) != str(routers()["coinflip"].gate.state_dict())
    batch = torch.linspace(0.2, 0.7, 8, dtype=torch.float64)
    assert torch.equal(again["coinflip"].gate.decide(batch, 2).routes_B, gate.decide(batch, 2).routes_B)
    fresh = {"new": routers()["coinflip"]}
    load_states(fresh, str(tmp_path))
    assert "shadow new has no state" in capsys.readouterr().out
    config = parse({"compare": [{"name": "coinflip", "detector": {"name": "monitor", "rules": ["x"]}}]})
    other = {shadow.name: Router(config, shadow.methods) for shadow in build_shadows(config)}
    with pytest.raises(UserError, match=r"compare.coinflip: grad_routing.detector.name='monitor'.*coinflip"):
        load_states(other, str(tmp_path))


def test_a_shadows_schedule_goes_on_where_it_was(tmp_path: Path) -> None:
    head_start = {"name": "route", "head_start_steps": 9, "head_start_until": 0.5}
    entry = {"name": "early", "preset": "coinflip", "intervention": head_start}

    def routers() -> dict[str, Router]:
        config = parse({"compare": [entry]})
        return {shadow.name: Router(config, shadow.methods) for shadow in build_shadows(config)}

    first = routers()
    first["early"].intervention.observe(2, {"flagged": 0.7})
    save_states(first, str(tmp_path))
    load_states(again := routers(), str(tmp_path))
    assert [again["early"].intervention.table_at(step).absorb.update_mask for step in (2, 3)] == [(0, 0), (1, 1)]


def test_detectors_say_whether_they_tell_rollouts_apart() -> None:
    assert [name for name in DETECTORS if not DETECTORS[name].tells_apart] == ["constant"]
