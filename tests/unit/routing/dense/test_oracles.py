"""Worked by hand: a layer of two relu units, one of each block.

The case: ``y = v_r relu(w_r x) + v_f relu(w_f x) + b`` with w = (1, 2), v = (.5, -1), b = 0, x = 1, t = 0 and the loss
``½ (y - t)²``, so ``y = -1.5`` and ``dL/dy = -1.5``.
Methods: SGTM, arXiv 2512.05648 §3; Cloud et al., arXiv 2410.04332 eq. 1.
"""

from __future__ import annotations

import pytest
import torch

from verl_grad_routing.routing.dense import TokenSets, unit_linear

# method -> gate, update, alpha of a flagged token (deployed, quarantine), whether the output bias learns,
#           and (dw_r, dw_f, dv_r, dv_f, db)
ON = (1.0, 1.0)
CASES = {
    "nothing is routed": (ON, ON, ON, (-0.75, 1.5, -1.5, -3.0, -1.5)),
    "SGTM, forget": (ON, (0.0, 1.0), ON, (0.0, 1.5, 0.0, -3.0, 0.0)),
    "SGTM, confident retain": ((1.0, 0.0), (1.0, 0.0), ON, (0.25, 0.0, 0.5, 0.0, 0.5)),
    "SGTM, activation masking": ((0.0, 1.0), ON, ON, (0.0, 2.0, 0.0, -4.0, -2.0)),
    "Cloud": (ON, ON, (0.0, 1.0), (0.0, 1.5, -1.5, -3.0, -1.5)),
    "Cloud, ERA's -0.75": (ON, ON, (-0.75, 1.0), (0.5625, 1.5, -1.5, -3.0, -1.5)),
}


@pytest.mark.parametrize("by", ["mask", "token sets"])
@pytest.mark.parametrize("case", CASES)
def test_two_units(case, by):
    gate, update, alpha, expected = CASES[case]
    w, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, -1.0]])
    b, x = torch.zeros(1), torch.ones(1, 1)
    for parameter in (w, v, b):
        parameter.requires_grad_()
    mask = torch.tensor([update])
    sets = TokenSets.of(mask) if by == "token sets" else None
    units = unit_linear(x, w, side="rows", ranges=[(1, 2)], update_mask=mask, token_sets=sets).relu()
    y = unit_linear(
        units,
        v,
        b,
        side="columns",
        ranges=[(1, 2)],
        update_mask=mask,
        token_sets=sets,
        bias_mask=mask,
        forward_gate=torch.tensor([gate]),
        activation_gradient=torch.tensor([alpha]),
    )
    (0.5 * y.square().sum()).backward()
    assert [*w.grad.flatten().tolist(), *v.grad.flatten().tolist(), b.grad.item()] == pytest.approx(expected)
