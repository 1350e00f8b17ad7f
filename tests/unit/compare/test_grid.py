"""Grid files: what they may say, and one line for what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_grad_routing.compare.cells import cells_of, check_configurations, locate
from verl_grad_routing.compare.grid import load_grid, presets
from verl_grad_routing.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes" / "comparison"


def test_yaml_is_read_with_off_as_a_name(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "name: g\nreference: off\ncontrol: null\nseeds: [3, 1]\nsteps: 2\nenvironments: [loopholes]\n"
        "arms:\n  - off\n  - {name: wide, preset: persona, overrides: [grad_routing.gate.route=0.5]}\n"
    )
    grid = load_grid(path)
    assert [(arm.name, arm.preset) for arm in grid.arms] == [("off", "off"), ("wide", "persona")]
    assert grid.seeds == (3, 1) and grid.environments[0].prepare == "loopholes"
    assert grid.environments[0].split == "test" and grid.reference == "off" and grid.jobs == 1


def test_cells_are_seed_major_and_say_everything(write_grid, tmp_path: Path) -> None:
    arms = ["off", {"name": "persona", "overrides": ["a.b=1"]}]
    grid = load_grid(write_grid(arms=arms, overrides=["c.d=2"], save_every=2, validate_every=3))
    built = locate(grid.environments[0], tmp_path / "out", tmp_path)
    cells = cells_of(grid, [built], tmp_path / "out")
    assert [cell.name for cell in cells] == [
        "toy/off/seed-0", "toy/persona/seed-0", "toy/off/seed-1", "toy/persona/seed-1",
    ]  # fmt: skip
    last = cells[-1]
    assert last.folder == tmp_path / "out" / "toy" / "persona" / "seed-1"
    for override in (
        "+grad_routing/environment=loopholes",
        "c.d=2",
        "a.b=1",
        "data.val_files=${grad_routing.environment.dir}/test.parquet",
        "trainer.total_training_steps=4",
        "trainer.test_freq=3",
        "trainer.save_freq=2",
        "trainer.resume_mode=auto",
        "data.seed=1",
    ):
        assert override in last.overrides, override
    assert not any(str(tmp_path) in override for override in last.overrides)  # places are no part of the settings
    assert last.places == (f"grad_routing.environment.dir={tmp_path / 'built'}",)
    assert cells[0].overrides != last.overrides and "a.b=1" not in cells[0].overrides
    assert [c.overrides[-6:] for c in cells[:2]] == [cells[0].overrides[-6:]] * 2  # paired: the same seeds


def test_a_cluster_takes_the_place_of_the_runs_own_ray(write_grid, tmp_path: Path) -> None:
    grid = load_grid(write_grid(ray_address="10.0.0.1:6379"))
    cell = cells_of(grid, [locate(grid.environments[0], tmp_path, tmp_path)], tmp_path)[0]
    assert "++ray_kwargs.ray_init.address='10.0.0.1:6379'" in cell.places
    assert "++ray_kwargs.ray_init.num_gpus=null" in cell.places  # Ray refuses sizes of a cluster that runs
    assert any(place.endswith(f"VERL_FILE_LOGGER_PATH={cell.folder}/metrics.jsonl") for place in cell.places)


BAD = {
    "no list": ({"arms": "off"}, "arms='off': give a list"),
    "no arms": ({"arms": []}, r"arms=\[\]: give at least one"),
    "unknown preset": ({"arms": ["off", "persna"]}, "arms.persna.preset='persna': did you mean"),
    "unknown preset of a named arm": ({"arms": ["off", {"name": "x", "preset": "of"}]}, "arms.x.preset='of'"),
    "arm without a name": ({"arms": [{"preset": "off"}]}, r"arms\[0\]="),
    "duplicate arms": ({"arms": ["off", "persona", "off"]}, "arms='off': given twice"),
    "unknown key of an arm": ({"arms": ["off", {"name": "x", "overides": []}]}, "overides"),
    "unpaired seeds": ({"arms": ["off", {"name": "persona", "seeds": [0, 2]}]}, "arms.persona.seeds=.*paired"),
    "a seed in an override": ({"arms": ["off", {"name": "persona", "overrides": ["data.seed=3"]}]}, "its key seeds"),
    "duplicate seeds": ({"seeds": [0, 0]}, "seeds=0: given twice"),
    "a seed that is none": ({"seeds": ["a"]}, "seeds='a': give a whole number"),
    "no seeds": ({"seeds": []}, "seeds"),
    "no steps": ({"steps": 0}, "steps=0"),
    "reference that is no arm": ({"reference": "none"}, "reference='none': no arm of this grid"),
    "control that is no arm": ({"control": "random"}, "control='random': no arm.*or null"),
    "unknown key": ({"step": 3}, "step=3: did you mean"),
    "a name for a path": ({"name": "a/b"}, "name='a/b'"),
    "steps in an override": ({"overrides": ["trainer.total_training_steps=3"]}, "its key steps"),
    "no override": ({"overrides": ["persona"]}, "overrides='persona': give Hydra overrides"),
    "dir and options": (
        {"environments": [{"name": "e", "dir": "x", "options": {"seed": 1}}]},
        "environments.e.options",
    ),
    "limit": ({"limit_s": -1}, "limit_s=-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_grids_are_one_line(name: str, write_grid) -> None:
    keys, told = BAD[name]
    with pytest.raises(UserError, match=told) as caught:
        load_grid(write_grid(**keys))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("grid.yaml: ")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_grid(tmp_path / "absent.yaml")
    for text, told in (("a: [", "no YAML"), ("- a\n", "must be a mapping"), ("name: x\n", "arms=None: this key")):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(UserError, match=told) as caught:
            load_grid(tmp_path / "g.yaml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("loophols", "environments.loophols.prepare='loophols': did you mean.*loopholes"),
        ({"name": "e", "dir": "absent"}, r"environments.e.dir='absent': not a prepared environment"),
        ({"name": "e", "dir": "built", "split": "clean"}, "environments.e.split='clean': built has no clean.parquet"),
        ({"name": "e", "dir": "built", "config": "gym"}, "environments.e.config='gym'"),
    ],
)
def test_bad_environments_are_one_line(place: object, told: str, write_grid, tmp_path: Path) -> None:
    grid = load_grid(write_grid(environments=[place]))
    with pytest.raises(UserError, match=told):
        locate(grid.environments[0], tmp_path / "out", tmp_path)


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_recipes_name_what_there_is(recipe: str, tmp_path: Path) -> None:
    grid = load_grid(RECIPES / recipe)
    built = [locate(place, tmp_path, RECIPES) for place in grid.environments]
    assert cells_of(grid, built, tmp_path) and {arm.preset for arm in grid.arms} <= set(presets())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_arm_of_a_recipe_composes(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("verl")
    grid = load_grid(RECIPES / recipe)
    cells = cells_of(grid, [locate(place, tmp_path, RECIPES) for place in grid.environments], tmp_path)
    check_configurations(cells)


def test_an_override_that_does_not_fit_is_told_before_anything_runs(write_grid, tmp_path: Path) -> None:
    pytest.importorskip("verl")
    arms = ["off", {"name": "persona", "overrides": ["grad_routing.gate.route=2"]}]
    grid = load_grid(write_grid(arms=arms))
    cells = cells_of(grid, [locate(grid.environments[0], tmp_path, tmp_path)], tmp_path)
    with pytest.raises(UserError, match=r"arms\.persona in toy: grad_routing\.gate") as caught:
        check_configurations(cells[1:])
    assert "\n" not in str(caught.value)
