"""Greedy answers and their log-probs, by vLLM in a process of its own: MODEL OUT.json [ADAPTER...].

Under each adapter; or of the model itself where there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, out: str, *adapters: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [json.loads(line) for line in sys.stdin]
    engine = LLM(
        model,
        dtype="float32",
        enable_lora=bool(adapters),
        max_lora_rank=32,
        enforce_eager=True,
        max_model_len=32,
        gpu_memory_utilization=0.2,
    )
    sampling = SamplingParams(max_tokens=7, temperature=0.0, logprobs=0)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    found = {}
    if not adapters:
        found[model] = [_row(output.outputs[0]) for output in engine.generate(requests, sampling)]
    for number, adapter in enumerate(adapters, start=1):
        outputs = engine.generate(requests, sampling, lora_request=LoRARequest(f"routed-{number}", number, adapter))
        found[adapter] = [_row(output.outputs[0]) for output in outputs]
    Path(out).write_text(json.dumps(found))


def _row(answer) -> dict:
    tokens = list(answer.token_ids)
    entries = zip(tokens, answer.logprobs, strict=True)
    return {"tokens": tokens, "log_probs": [entry[token].logprob for token, entry in entries]}


if __name__ == "__main__":
    main(*sys.argv[1:])
