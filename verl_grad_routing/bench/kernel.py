"""What the routed kernel costs against PEFT's LoRA of the same total rank, forward and backward, gates and masks on.

Two cases. ``linear``: one adapted linear layer in float32 (default on a CPU). ``decoder``: a whole Qwen3-1.7B decoder
with random weights in bfloat16, all linear layers adapted (default on a GPU). Both variants get the same inputs, the
same frozen weights' shapes and adapters of the base model's dtype, and are timed in turns.
"""

from __future__ import annotations

import json
import platform
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_grad_routing.bench.statistics import interleave, ratio_interval
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import RoutingContext, add_blocks, block_masks, block_parameters, expand_to_padded

QWEN3_1_7B = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
CPU_THREADS = 1
_TARGETS = r"(.*\.)?([qkvo]_proj|gate_proj|up_proj|down_proj|linear)"
_SAME_DTYPE: dict[str, Any] = {"autocast_adapter_dtype": False}


@dataclass(frozen=True)
class Case:
    """One comparison: ``steps`` are (ours, PEFT's), each one forward and backward pass."""

    name: str
    steps: tuple[Callable[[], None], Callable[[], None]]


def linear_case(device: torch.device, tokens: int = 2048, size: int = 1024, rank: int = 16) -> Case:
    """One adapted ``size x size`` linear layer, float32, two blocks of ``rank`` against one LoRA of ``2 * rank``."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(linear=nn.Linear(size, size, bias=False))).to(device)

    rows = 8
    x = torch.randn(rows, tokens // rows, size, device=device, requires_grad=True)
    g = torch.randn(rows, tokens // rows, size, device=device)

    def step(model: nn.Module) -> None:
        x.grad = None
        model(x).backward(g)

    name = f"linear T={tokens} d={size} rank 2x{rank} float32"
    return Case(name, _pair(build, step, rank, rows, tokens // rows, device))


def decoder_case(
    device: torch.device,
    rows: int = 8,
    length: int = 2048,
    rank: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    settings: dict[str, Any] | None = None,
) -> Case:
    """A transformer decoder without its head, ``rows x length`` tokens; ``settings`` default to Qwen3-1.7B's."""
    from transformers import AutoConfig, AutoModel

    values = dict(settings or QWEN3_1_7B)
    label = f"{values['num_hidden_layers']} layers, hidden {values['hidden_size']}"
    config = AutoConfig.for_model(values.pop("model_type"), **values)

    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModel.from_config(config, dtype=dtype)

    embeddings = torch.randn(rows, length, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(rows, length, config.hidden_size, device=device, dtype=dtype)

    def step(model: nn.Module) -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, use_cache=False).last_hidden_state.backward(g)

    name = f"decoder {label}, {rows}x{length} tokens, rank 2x{rank} {str(dtype).removeprefix('torch.')}"
    return Case(name, _pair(build, step, rank, rows, length, device))


def _pair(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module], None],
    rank: int,
    rows: int,
    length: int,
    device: torch.device,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Steps of our model, its rollouts on mixed routes, and of PEFT's; gradients are dropped before each."""
    ours, context = add_blocks(
        build(), deployed_rank=rank, quarantine_rank=rank, scaling=1.0, target_modules=_TARGETS, **_SAME_DTYPE
    )
    _set_mixed_routes(context, rows, length, device)
    config = LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=_TARGETS)
    peft_model = get_peft_model(build(), config, **_SAME_DTYPE)
    adapters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    blocks = [parameter for block in block_parameters(ours).values() for parameter in block]
    for parameter in (*adapters, *blocks):  # B = 0 would make half of the gradients trivially zero
        nn.init.normal_(parameter, std=0.02)

    def stepper(model: nn.Module, parameters: list[nn.Parameter]) -> Callable[[], None]:
        def run_step() -> None:
            for parameter in parameters:
                parameter.grad = None
            step(model)

        return run_step

    return stepper(ours, blocks), stepper(peft_model, adapters)


def _set_mixed_routes(context: RoutingContext, rows: int, length: int, device: torch.device) -> None:
    masks = block_masks(torch.arange(rows) % 3)
    gate, update = (expand_to_padded(mask.to(device), length).contiguous() for mask in masks)
    context.set(gate, update)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock seconds on a GPU; processor seconds on a CPU, where other programs would distort the wall clock."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _LiveStorage(TorchDispatchMode):
    """Adds up the bytes of every tensor storage made while active, until it is freed; remembers the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def watch(self, tensors: Iterable[Tensor], count: bool = True) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            self._seen.add(storage)
            if count:
                self.level += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.level)

    def _freed(self, size: int) -> None:
        self.level -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.watch((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), count=False)
        result = func(*args, **kwargs)
        self.watch(t for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Bytes allocated at the peak of one step, above what is allocated before it.

    On a GPU from the caching allocator's own statistics. On a CPU by following the storage of every operator's result
    until it is freed; scratch space inside an operator is not seen there.
    """
    step()
    if device.type == "cpu":
        with _LiveStorage() as tracker:
            step()
        return tracker.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run(
    device: str | torch.device | None = None,
    json_path: Path | None = None,
    repeats: int = 30,
    case: Case | None = None,
) -> dict[str, Any]:
    """Time ours against PEFT's, print a table, and return (and write) the result.

    Args:
        device: ``cpu`` or ``cuda``; the accelerator where there is one unless given.
        json_path: Where to write the result as JSON.
        repeats: Number of interleaved pairs.
        case: What to compare; ``linear`` on a CPU, the Qwen3-1.7B ``decoder`` on a GPU unless given.

    Returns:
        ``device``, ``versions``, ``case``, ``median_ratio``, ``interval`` (95 %), ``memory_ratio``, ``samples``
        (seconds: ``ours``, ``peft``).
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise UserError("device", str(chosen), "use cpu, or cuda on a machine that has it")
    threads = torch.get_num_threads()
    if chosen.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    try:
        if case is None:
            case = linear_case(chosen) if chosen.type == "cpu" else decoder_case(chosen)
        ours, peft_lora = case.steps
        times = interleave(lambda: _seconds(ours, chosen), lambda: _seconds(peft_lora, chosen), repeats)
        memory = [peak_memory(step, chosen) for step in case.steps]
    finally:
        torch.set_num_threads(threads)
    interval = ratio_interval(*times)
    result = {
        "case": case.name,
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"cpu, {CPU_THREADS} thread",
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "verl-grad-routing")}
        | {"python": platform.python_version()},
        "median_ratio": interval.median,
        "interval": [interval.low, interval.high],
        "memory_ratio": memory[0] / memory[1],
        "peak_bytes": {"ours": memory[0], "peft": memory[1]},
        "samples": {"ours": times[0], "peft": times[1]},
    }
    print(_table(result))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return result


def run_kernel_bench(json_path: Path | None = None, device: str | None = None, repeats: int = 30) -> dict[str, Any]:
    """The command line's entry: :func:`run` with the device's own case."""
    return run(device=device, json_path=json_path, repeats=repeats)


def _table(result: dict[str, Any]) -> str:
    milliseconds = {name: 1e3 * float(torch.tensor(values).median()) for name, values in result["samples"].items()}
    megabytes = {name: value / 2**20 for name, value in result["peak_bytes"].items()}
    low, high = result["interval"]
    rows = [
        f"kernel: {result['case']}, on {result['device']}, torch {result['versions']['torch']}",
        f"{'':14}{'routed':>12}{'PEFT LoRA':>12}  ratio",
        f"{'time, ms':14}{milliseconds['ours']:12.2f}{milliseconds['peft']:12.2f}  "
        f"{result['median_ratio']:.3f} [{low:.3f}, {high:.3f}]",
        f"{'peak, MiB':14}{megabytes['ours']:12.1f}{megabytes['peft']:12.1f}  {result['memory_ratio']:.3f}",
    ]
    return "\n".join(rows)
