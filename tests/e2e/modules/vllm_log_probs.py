"""Greedy answers and their log-probs under an adapter, by vLLM in a process of its own: MODEL ADAPTER OUT.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, adapter: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [json.loads(line) for line in sys.stdin]
    engine = LLM(
        model,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        enforce_eager=True,
        max_model_len=32,
        gpu_memory_utilization=0.2,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(max_tokens=7, temperature=0.0, logprobs=0),
        lora_request=LoRARequest("routed", 1, adapter),
    )
    rows = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        entries = zip(tokens, output.outputs[0].logprobs, strict=True)
        rows.append({"tokens": tokens, "log_probs": [entry[token].logprob for token, entry in entries]})
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
