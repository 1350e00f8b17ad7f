"""Files that overrides name decide results by their content, not by their name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_grad_routing.compare import contents
from verl_grad_routing.compare.contents import digest_of, method_packages, named_in
from verl_grad_routing.compare.record import code_hash, settings_hash

OUTSIDE = Path(__file__).parents[2] / "modules" / "outside"


def test_files_in_values_are_found(tmp_path: Path) -> None:
    pairs, basis, model = tmp_path / "pairs.md", tmp_path / "basis.safetensors", tmp_path / "model"
    for file in (pairs, basis, model / "config.json", tmp_path / "plain"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("1")
    overrides = [
        f"grad_routing.detector.pairs='{pairs}#sycophancy'",
        f"grad_routing.blocks.hooks=[{{name: project_update, basis: '{basis}'}}]",
        f"actor_rollout_ref.model.path={model}",
        f"grad_routing.detector.pairs='{pairs}'",
        f"trainer.default_local_dir={tmp_path}",
        f"grad_routing.record_dir={tmp_path}",
        f"++hydra.run.dir={tmp_path}",
        "trainer.total_training_steps=50",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "data.val_files=${grad_routing.environment.dir}/test.parquet",
        "grad_routing.detector.pairs=/no/such/file",
    ]
    assert named_in(overrides) == [pairs, basis, model]


def test_another_content_is_another_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    (model / "deep").mkdir(parents=True)
    (model / "deep" / "weights").write_text("a")
    pairs.write_text("a")
    given = [f"actor_rollout_ref.model.path={model}", f"grad_routing.detector.pairs={pairs}"]
    seen = {settings_hash("persona", given, [])}
    for change in (
        lambda: pairs.write_text("b"),
        lambda: (model / "deep" / "weights").write_text("b"),
        lambda: (model / "deep" / "weights").rename(model / "weights"),
    ):
        change()
        seen.add(settings_hash("persona", given, []))
    assert len(seen) == 4


def test_large_files_count_by_size_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE", 10)
    monkeypatch.setattr(contents, "END", 2)
    file, seen = tmp_path / "file", set()
    for text in ("ab" + "x" * 20 + "yz", "ac" + "x" * 20 + "yz", "ab" + "x" * 20 + "yy", "ab" + "x" * 21 + "yz"):
        file.write_text(text)
        seen.add(digest_of(file))
    assert len(seen) == 4


def test_packages_of_methods_are_training_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_hash()
    assert not any(line.startswith("outside") for line in method_packages())
    monkeypatch.syspath_prepend(OUTSIDE)
    [line] = [line for line in method_packages() if "outside" in line or "methods" in line]
    assert len(line.split()) == 3 and len(line.split()[2]) == 16
    assert code_hash() != before
