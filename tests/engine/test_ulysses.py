"""Under sequence parallelism every token keeps its own row's masks."""

from __future__ import annotations

import pytest
import torch

from tests.engine.reference import DEFAULT
from tests.engine.rollouts import with_token_routes
from tests.engine.token_reference import routes_by_position

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("bucketed", [False, True])
def test_masks_are_sliced_as_the_inputs_are(bucketed, worlds, inputs):
    found = worlds(2)["ulysses"][bucketed]
    # row 0 is padding: every mask is 1 there
    gates = torch.tensor([(1, 1), *(DEFAULT[row.route][0] for row in inputs.rollouts)], dtype=torch.float32)
    updates = torch.tensor([DEFAULT[row.route][1] for row in inputs.rollouts], dtype=torch.float32)
    updates = updates * torch.tensor([[row.weight] for row in inputs.rollouts])
    updates = torch.cat((torch.ones(1, 2), updates))
    for ids, gate, update in found["parts"]:
        assert gate.shape == update.shape == (*ids.shape, 2)
        assert torch.equal(gate, gates[ids]) and torch.equal(update, updates[ids])
    together = torch.cat([ids for ids, _, _ in found["parts"]], dim=1)[0]
    assert found["pad"] > 0 and len(together) == found["tokens"] + found["pad"]
    assert (together[: found["tokens"]] > 0).all() and (together[found["tokens"] :] == 0).all()


@pytest.mark.parametrize("bucketed", [False, True])
def test_masks_of_tokens_are_sliced_as_the_inputs_are(bucketed, worlds, inputs):
    found = worlds(2)["ulysses"][2 + bucketed]
    rows = with_token_routes(inputs.rollouts[: found["rows"]])
    by_position = [(DEFAULT[route], row.weight) for row in rows for route in routes_by_position(row)]
    gates = torch.tensor([(1, 1), *(masks[0] for masks, _ in by_position)], dtype=torch.float32)
    updates = torch.tensor([(1, 1), *((w * d, w * q) for (_, (d, q)), w in by_position)], dtype=torch.float32)
    for ids, gate, update in found["parts"]:
        assert torch.equal(gate, gates[ids]) and torch.equal(update, updates[ids])
    together = torch.cat([ids for ids, _, _ in found["parts"]], dim=1)[0]
    assert together[: found["tokens"]].tolist() == list(range(1, found["tokens"] + 1))
