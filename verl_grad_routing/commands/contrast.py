"""``vgr contrast``: what contrastive pairs change in the inputs of a model's linear layers, for bases made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_grad_routing.chat import Switches, described, load_tokenizer, parse_switches
from verl_grad_routing.commands.options import Chat
from verl_grad_routing.errors import UserError

if TYPE_CHECKING:
    from verl_grad_routing.routing import Contrast


def contrast(
    model: Annotated[Path, typer.Argument(help="Folder of the model that training starts from.")],
    pairs: Annotated[str, typer.Option(help="Contrastive pairs: path.jsonl[@tag,tag] or path.md#section[@tag,tag].")],
    to: Annotated[Path, typer.Option("--to", help="File to write: name.safetensors.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the best one there by default.")] = None,
    chat: Chat = None,
) -> None:
    """Record what the pairs change in every layer's inputs, for the bases corda, scorda and scorda_rev."""
    made = make_contrast(model, pairs, device, parse_switches(chat))
    from verl_grad_routing.routing import save_contrast

    save_contrast(made, to)
    count, layers = len(next(iter(made.differences.values()))), len(made.differences)
    print(f"{to}: {count} pairs of {pairs} in {layers} of {made.origin['linear_layers']} linear layers of {model}")


def make_contrast(model: Path, pairs: str, device: str | None = None, chat: Switches | None = None) -> Contrast:
    """Run both sides of every pair through the untrained model, in float32.

    Raises:
        UserError: No model there, bad pairs (see ``load_pairs``), or activations that are not finite.
    """
    if not (model / "config.json").is_file():
        raise UserError("MODEL", str(model), "no config.json there; give a Hugging Face model's folder")
    from verl_grad_routing.directions import load_pairs

    chosen = load_pairs(pairs)
    import torch
    from transformers import AutoModelForCausalLM

    from verl_grad_routing.directions.inputs import input_differences
    from verl_grad_routing.envs.progress import progress
    from verl_grad_routing.routing import Contrast
    from verl_grad_routing.subspaces.basis import model_hash
    from verl_grad_routing.training.pairs_pass import pair_tokens
    from verl_grad_routing.warm_up.command import linear_modules

    tokenizer = load_tokenizer(model, chat)
    texts = [pair_tokens(pair, tokenizer) for pair in chosen]
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = network.to(place)
    layers = {name: network.get_submodule(name) for name in linear_modules(model)}
    with progress("pairs", len(texts)) as advance:
        differences = input_differences(network, layers, texts, advance)
    origin = {
        "model": str(model),
        "model_hash": model_hash(model),
        "linear_layers": str(len(layers)),
        **described(chat),
    }
    return Contrast(differences, {**origin, "pairs": pairs, "pairs_hash": chosen.content_hash})
