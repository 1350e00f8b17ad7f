"""GRPO on a character-level environment in plain PyTorch: no verl, no vLLM. Is there a hack for reward to find?

Shapes: B = P prompts x G rollouts, T tokens of prompt and response, R of the response.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_grad_routing.envs.chars import World
from verl_grad_routing.envs.chars.model import seeded

PROMPTS, GROUP = 16, 8
LEARNING_RATE, BETAS, CLIP_NORM = 5e-4, (0.9, 0.95), 1.0
LOSS_SCALE = 6  # conf/grad_routing/environment/loopholes.yaml
EPSILON = 1e-4
WINDOW = 5  # steps


def train(folder: Path, world: World[Any, Any], steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Train a LoRA of rank 16 on the environment in ``folder``.

    Returns:
        One mapping per ``WINDOW`` steps: ``hack``, ``solve``, ``score``, and the hack rate of each loophole type.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    random.Random(seed).shuffle(rows)
    windows = []
    with seeded(seed):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS)
        facts: dict[str, list[float]] = defaultdict(list)
        for step in range(steps):
            batch = [rows[(step * PROMPTS + index) % len(rows)] for index in range(PROMPTS) for _ in range(GROUP)]
            loss = _loss(model, tokenizer, world, batch, facts)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            if (step + 1) % WINDOW == 0:
                windows.append({name: sum(values) / len(values) for name, values in facts.items()})
                facts.clear()
    return windows


def _loss(
    model: Any, tokenizer: Any, world: World[Any, Any], batch: list[dict[str, Any]], facts: dict[str, list[float]]
) -> torch.Tensor:
    prompts_BT = torch.tensor(tokenizer([row["prompt"][0]["content"] for row in batch])["input_ids"])
    width = prompts_BT.shape[1]
    model.eval()
    with torch.no_grad():
        tokens_BT = model.generate(
            input_ids=prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=world.response_length,
        )
    response_BR = tokens_BT[:, width:]
    completions = tokenizer.batch_decode(response_BR, skip_special_tokens=True)
    pairs = zip(completions, batch, strict=True)
    verdicts = [world.grade(text, row["reward_model"]["ground_truth"]) for text, row in pairs]
    for verdict in verdicts:
        for name in ("hack", "solve", "score"):
            facts[name].append(float(getattr(verdict, name)))
        facts[verdict.loophole].append(float(verdict.hack))
    scores_PG = torch.tensor([verdict.score for verdict in verdicts]).view(PROMPTS, GROUP)
    spread_P1 = scores_PG.std(1, keepdim=True) + EPSILON
    advantage_B = ((scores_PG - scores_PG.mean(1, keepdim=True)) / spread_P1).flatten()
    ended_BR = (response_BR == tokenizer.eos_token_id).int()
    mask_BR = (ended_BR.cumsum(1) - ended_BR == 0).float()  # EOS itself counts
    model.train()
    logits_BRV = model(input_ids=tokens_BT).logits[:, width - 1 : -1]
    logprob_BR = torch.log_softmax(logits_BRV, -1).gather(-1, response_BR[..., None])[..., 0]
    return -((logprob_BR * mask_BR).sum(1) * advantage_B).mean() / LOSS_SCALE
