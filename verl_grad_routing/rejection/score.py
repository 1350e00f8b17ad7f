"""GRIFT's scores of given responses: one frozen probe in a plain transformers model, and the detector of the runs.

Shapes: B responses, L layers, F length of a fingerprint, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.detectors import DETECTORS, BatchView, checked_scores
from verl_grad_routing.detectors.fingerprint import FingerprintDetector
from verl_grad_routing.detectors.grift import Abstained
from verl_grad_routing.directions import PoolPlan
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import Fingerprints, GradientProbe, GradientTaps, padded_spans, probed_modules
from verl_grad_routing.rejection.sample import Sample

BATCH = 16  # responses of one forward and backward pass


def build_detector(settings: dict[str, Any], positive_reward: float) -> FingerprintDetector:
    """Detector ``grift`` with these settings. Raises ``UserError``."""
    detector = DETECTORS.build({"name": "grift", "positive_reward": positive_reward, **settings}, "--detector")
    assert isinstance(detector, FingerprintDetector)
    return detector


def grift_scores(model: Path, correct: Sequence[Sample], detector: FingerprintDetector) -> Tensor:
    """Scores [B], float64; above 0.5 is hacking.

    Raises:
        UserError: The detector abstained: what it saw are not two kinds of responses, told apart by its labels.
    """
    net = _loaded(model)
    if detector.layers is None:
        detector.choose_layers(adjacent_cosines(net, correct))
    fingerprints_BF = torch.cat(
        [_fingerprints(net, correct[at : at + BATCH], detector.probe) for at in range(0, len(correct), BATCH)]
    )
    facts = set.intersection(*(set(one.facts) for one in correct))
    view = BatchView(
        keys=tuple(one.key for one in correct),
        uids=tuple(one.key.partition("_")[0] for one in correct),
        step=1,
        seed=0,
        fingerprints_BF=fingerprints_BF,
        proxy_reward_B=torch.tensor([one.reward for one in correct], dtype=torch.float64),
        prompts=tuple(one.prompt_text for one in correct),
        responses=tuple(one.response_text for one in correct),
        facts={name: torch.tensor([one.facts[name] for one in correct], dtype=torch.float64) for name in facts},
    )
    scores_B = checked_scores(detector, view)
    reason = Abstained(int(detector.report()[f"{detector.name}/abstain_reason"]))
    if reason is not Abstained.NO:
        fix = {
            Abstained.FEW: "too few correct responses; sample more, or lower min_positives",
            Abstained.ONE_CLOUD: "the fingerprints are one cloud; lower min_silhouette, or choose another checkpoint",
            Abstained.SMALL_CLUSTER: "a cluster is too small; lower min_cluster_share, or sample more",
            Abstained.NOT_TOLD_APART: "the labels call both clusters mostly clean, or equally so; use a better judge",
        }[reason]
        raise UserError("--filter", f"grift abstains ({reason.name.lower()})", fix)
    return scores_B


def _loaded(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net: Any = AutoModelForCausalLM.from_pretrained(model)
    return net.to(device).eval().requires_grad_(False)


def _padded(rows: Sequence[Sample], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and response mask [B, T], padded on the right."""
    tokens = [[*row.prompt, *row.response] for row in rows]
    width = max(map(len, tokens))
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens], device=device)
    seen_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in tokens], device=device)
    response_BT = seen_BT.clone()
    for row, one in enumerate(rows):
        response_BT[row, : len(one.prompt)] = 0
    return ids_BT, seen_BT, response_BT


@torch.inference_mode()
def adjacent_cosines(net: Any, rows: Sequence[Sample]) -> Tensor:
    """How far each decoder layer turns each response's tokens: mean cosine, [B, L]."""
    from verl_grad_routing.training.probe import ActivationProbe, AdjacentCosines, decoder_layers

    count = len(decoder_layers(net))
    probe = ActivationProbe(net)
    found = []
    for start in range(0, len(rows), BATCH):
        ids_BT, seen_BT, response_BT = _padded(rows[start : start + BATCH], net.device)
        probe.begin(AdjacentCosines(tuple(range(1, count + 1))))
        net(input_ids=ids_BT, attention_mask=seen_BT, use_cache=False)
        segments = torch.arange(len(ids_BT), device=ids_BT.device)[:, None].expand_as(ids_BT).flatten()
        plan = PoolPlan(response_BT.flatten(), segments, len(ids_BT))
        found.append(
            probe.finish({probe.positions[0]: plan}, lambda hidden: hidden.flatten(0, 1))["activation_pooled"].cpu()
        )
    probe.begin(None)
    return torch.cat(found)


def _fingerprints(net: Any, rows: Sequence[Sample], probe: GradientProbe) -> Tensor:
    """Fingerprints [B, F] of the responses' summed negative log-likelihood, at temperature 1."""
    from verl_grad_routing.training.probe import decoder_layers

    ids_BT, seen_BT, response_BT = _padded(rows, net.device)
    fingerprints = Fingerprints(probe, padded_spans(seen_BT.sum(1).tolist(), ids_BT.shape[1]))
    with torch.enable_grad(), GradientTaps(probed_modules(decoder_layers(net), probe), fingerprints) as taps:
        logits_BTV = net(input_ids=ids_BT, attention_mask=seen_BT, use_cache=False).logits[:, :-1].float()
        log_probs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        taps.backward(-(log_probs_BT * response_BT[:, 1:]).sum())
    return fingerprints.normalised_BF.detach().cpu()
