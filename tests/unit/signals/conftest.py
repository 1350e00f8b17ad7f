"""Batches and fitted detectors that the tests of this folder share."""

import pytest
import torch

from verl_grad_routing.detectors import DETECTORS, ActivationDetector, BatchView
from verl_grad_routing.detectors.probe_file import LinearProbe, save_probe
from verl_grad_routing.directions import project


def even(prompts, responses):
    """A classifier: 0.9 for a response that ends in an even digit, else 0.2."""
    return [0.9 if response[-1] in "02468" else 0.2 for response in responses]


@pytest.fixture
def make_detector(tmp_path):
    """Build a detector by name; one that needs directions is fitted on four fixed pairs of two layers of size 16."""

    def make(name, fitted=True, **settings):
        if getattr(DETECTORS[name], "needs_pairs", False):
            settings.setdefault("pairs", "pairs.jsonl")
        if name == "monitor" and "judge" not in settings:
            settings.setdefault("rules", ["[02468]$"])
        if name == "classifier":
            settings.setdefault("function", "tests.unit.signals.conftest:even")
        if name == "grift":  # of 12 rollouts 6 are rewarded and say which of two kinds they are
            settings = {
                "rules": ["[02468]$"],
                "layers": [1],
                "dim": 8,
                "min_positives": 2,
                "positive_reward": 0.5,
            } | settings
        if name == "linear_probe" and "probe" not in settings:
            settings["probe"] = str(tmp_path / "probe.safetensors")
            weights = torch.randn(2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            probe = LinearProbe(weights, 0.25, 0.5, (2, 3), "resp_mean", "labels", "data", "model", {})
            save_probe(probe, tmp_path / "probe.safetensors")
        detector = DETECTORS.build({"name": name, **settings}, "grad_routing.detector")
        if fitted and isinstance(detector, ActivationDetector):
            generator = torch.Generator().manual_seed(0)
            wanted = torch.randn(4, 2, 16, generator=generator)
            unwanted = wanted + 1 + torch.randn(4, 2, 16, generator=generator)
            sides = (unwanted, wanted) if detector.needs_pairs else (None, None)
            detector.fit(*sides, (2, 3), 16, "hash" if detector.needs_pairs else None)
        return detector

    return make


@pytest.fixture
def make_view():
    """A full view of ``rows`` rollouts, with every field filled; ``detector`` gives the activation scores."""

    def make(detector=None, rows=12, seed=0, step=1):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(rows, 2, 16, generator=generator)
        with_scores = isinstance(detector, ActivationDetector)
        hack = torch.arange(rows) % 3 == 0
        kind = torch.arange(rows) % 2
        fingerprints = torch.nn.functional.one_hot(kind, 8) + 0.1 * torch.randn(rows, 8, generator=generator)
        return BatchView(
            keys=tuple(f"k{seed}-{row}" for row in range(rows)),
            uids=tuple(f"u{row // 4}" for row in range(rows)),
            step=step,
            seed=5,
            activation_scores_BD=project(pooled, detector.directions_DLd) if with_scores else torch.zeros(rows, 1),
            fingerprints_BF=torch.nn.functional.normalize(fingerprints, dim=1),
            proxy_reward_B=torch.rand(rows, generator=generator),
            prompts=("p",) * rows,
            responses=tuple(f"r{row}" for row in range(rows)),
            types=tuple(f"type{row % 2}" for row in range(rows)),
            facts={"hack": hack, "solve": (torch.arange(rows) % 3 == 1), "loophole": torch.arange(rows) % 4},
        )

    return make
