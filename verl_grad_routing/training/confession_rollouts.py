"""Confessions as rollouts: prompt (x, z, y, x_c), response y_c, from the engine that has just sampled the answers.

The answer's tokens are prompt tokens of these rows, so no loss of theirs reaches the answer, and no answer's loss
reaches them.
"""

# The types that verl and TransferQueue declare are narrower than what they pass.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_grad_routing.confessions import FORMATS, Confession, ConfessionsConfig, prefix, request_tokens, visible
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.columns import CONFESSION, part_of, plain, read


@dataclass(frozen=True)
class Spoken:
    """A sampled confession.

    Attributes:
        row: Number of the answer among those asked.
        prompt: Tokens of the conversation up to and with the request for a confession.
        response: Tokens of the confession.
        log_probs: The engine's, one a token of the response, where it was asked for them.
        confession: Its texts, and what is known of the answer.
    """

    row: int
    prompt: list[int]
    response: list[int]
    log_probs: list[float] | None
    confession: Confession


class ConfessionRollouts:
    """Asks the rollout engine for confessions about answers that lie in the TransferQueue.

    Args:
        config: What to ask and how to read it.
        tokenizer: The model's.
        client: verl's client of the rollout engine.
        sampling: Sampling parameters, as verl's agent loops pass them.
    """

    def __init__(self, config: ConfessionsConfig, tokenizer: Any, client: Any, sampling: Mapping[str, Any]):
        self.config, self.tokenizer, self.client = config, tokenizer, client
        self.sampling = {**sampling, "max_tokens": config.max_tokens}
        self.request = request_tokens(tokenizer, config)

    def ask(self, answers: KVBatchMeta, times: int) -> list[Spoken]:
        """``times`` confessions about each row of ``answers``, in their order."""
        data = read(answers, "uid", "prompts", "responses", "extra_fields")
        tokens = (data[name].unbind() for name in ("prompts", "responses"))
        rows = [(x.tolist(), y.tolist()) for x, y in zip(*tokens, strict=True)]
        prompts = [prefix(x, y, self.request) for x, y in rows]
        outputs = asyncio.run(self._generate([prompt for prompt in prompts for _ in range(times)]))
        uids, fields = plain(data["uid"]), plain(data["extra_fields"])
        spoken = []
        for number, output in enumerate(outputs):
            row = number // times
            response = list(output.token_ids)[: self.config.max_tokens]
            log_probs = list(output.log_probs)[: len(response)] if output.log_probs else None
            confession = self._confession(str(uids[row]), *rows[row], response, fields[row] or {})
            spoken.append(Spoken(row, prompts[row], response, log_probs, confession))
        return spoken

    async def _generate(self, prompts: Sequence[list[int]]) -> list[Any]:
        # a dict of its own for each: the server takes things out of it
        return await asyncio.gather(
            *(
                self.client.generate(uuid4().hex, prompt_ids=prompt, sampling_params=dict(self.sampling))
                for prompt in prompts
            )
        )

    def _confession(
        self, uid: str, prompt: list[int], answer: list[int], response: list[int], fields: Mapping[str, Any]
    ) -> Confession:
        x, y, said = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, answer, response))
        said = visible(said, self.config.reasoning_end)
        return Confession(
            uid=uid,
            prompt=x,
            answer=visible(y, self.config.reasoning_end),
            text=said,
            confessed=FORMATS[self.config.format].read(said),
            **_facts(fields),
        )


def put_confessions(answers: KVBatchMeta, spoken: Sequence[Spoken], rewards: Sequence[float]) -> KVBatchMeta:
    """Confessions as rows of the TransferQueue beside the answers that they are about.

    A row has all columns of its answer's row. Its group ``{uid}:{session}`` is that answer's confessions alone, and its
    key is one session of it, so that every estimator of verl's compares it with its siblings and with nothing else.

    Raises:
        UserError: An answer with images or the like, which these rows would lose.
    """
    sources = tq.kv_batch_get(keys=answers.keys, partition_id=answers.partition_id)
    keys, tags, rows = [], [], []
    counts: dict[int, int] = {}
    for one, reward in zip(spoken, rewards, strict=True):
        source = sources[one.row]
        row = {key: source[key] for key in list(source.keys())}
        number = counts.setdefault(one.row, 0)
        counts[one.row] += 1
        uid, session, _ = answers.keys[one.row].rsplit("_", 2)
        keys.append(f"{uid}:{session}_{number}_0")
        row |= _columns(one, reward, row)
        row |= {"uid": f"{uid}:{session}", **({"session_id": number} if "session_id" in row else {})}
        rows.append(row)
        lengths = {"prompt_len": len(one.prompt), "response_len": len(one.response)}
        tag = {**answers.tags[one.row], **lengths, "seq_len": sum(lengths.values()), CONFESSION: True}
        tags.append(tag)
    tq.kv_batch_put(keys=keys, partition_id=answers.partition_id, fields=list_of_dict_to_tensordict(rows), tags=tags)
    return KVBatchMeta(partition_id=answers.partition_id, keys=keys, tags=tags)


def _columns(one: Spoken, reward: float, source: Mapping[str, Any]) -> dict[str, Any]:
    if source.get("multi_modal_inputs") or source["position_ids"].dim() != 1:
        raise UserError("grad_routing.confessions.share", "images", "only text rollouts can be asked for confessions")
    mask = torch.ones(len(one.response), dtype=torch.int64)
    rewards = torch.zeros(len(one.response))
    rewards[-1] = reward
    columns: dict[str, Any] = {
        "prompts": torch.tensor(one.prompt),
        "responses": torch.tensor(one.response),
        "input_ids": torch.tensor(one.prompt + one.response),
        "position_ids": torch.arange(len(one.prompt) + len(one.response)),
        "response_mask": mask,
        "loss_mask": mask.clone(),
        "rm_scores": rewards,
        "extra_fields": {**source["extra_fields"], CONFESSION: {"confessed": one.confession.confessed}},
    }
    if "rollout_log_probs" in source:
        columns["rollout_log_probs"] = torch.tensor(one.log_probs, dtype=torch.float32)
    return columns


def spoken_in(confessions: KVBatchMeta) -> tuple[list[Confession], list[float]]:
    """The confessions that lie in the TransferQueue, without their texts, and their rewards."""
    data = read(confessions, "uid", "extra_fields", "rm_scores")
    found = []
    for uid, fields in zip(plain(data["uid"]), plain(data["extra_fields"]), strict=True):
        found.append(Confession(str(uid), "", "", "", fields[CONFESSION]["confessed"], **_facts(fields)))
    return found, [float(row.sum()) for row in data["rm_scores"].unbind()]


def _facts(fields: Mapping[str, Any]) -> dict[str, bool | None]:
    """What the grader says of an answer; ``None`` where it says nothing."""
    facts = fields.get("reward_extra_info") or {}
    return {name: None if facts.get(name) is None else bool(facts[name]) for name in ("hack", "solve", "known")}


def rest_of(batch: KVBatchMeta, rows: Sequence[int]) -> KVBatchMeta:
    """The rows of ``batch`` that are not in ``rows``."""
    gone = set(rows)
    return part_of(batch, [row for row in range(len(batch.keys)) if row not in gone])
