"""``vgr token-weights``: which tokens are worth routing, from how often they occur in two kinds of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.errors import UserError

Text = Annotated[str, typer.Option(help="Column of the texts in a parquet; other files hold one text a line.")]


def token_weights(
    model: Annotated[Path, typer.Argument(help="Folder of the model that is trained, for its tokenizer.")],
    forget: Annotated[Path, typer.Option(help="Texts of what is to be routed: a parquet, or one text a line.")],
    retain: Annotated[Path, typer.Option(help="Texts of everything else, likewise.")],
    to: Annotated[Path, typer.Option("--to", help="File to write: name.parquet.")],
    column: Text = "text",
    forget_pseudo: Annotated[float, typer.Option(help="Added to every count in the forget texts.")] = 1.0,
    retain_pseudo: Annotated[float, typer.Option(help="Added to every count in the retain texts.")] = 20.0,
    scale: Annotated[float, typer.Option(help="Of the difference of ratios.")] = 1.0,
    bias: Annotated[float, typer.Option(help="Added to it before the sigmoid.")] = -4.0,
) -> None:
    """Weigh every token by its frequencies in forget and retain texts, for intervention cloud (arXiv 2410.04332)."""
    if not (model / "config.json").is_file():
        raise UserError("MODEL", str(model), "no config.json there; give a Hugging Face model's folder")
    if to.suffix != ".parquet":
        raise UserError("--to", str(to), "give a name that ends in .parquet")
    from verl_grad_routing.token_weights import Frequencies, count_tokens, read_texts, save_weights

    frequencies = Frequencies(forget_pseudo=forget_pseudo, retain_pseudo=retain_pseudo, scale=scale, bias=bias)
    texts = [read_texts(path, column) for path in (forget, retain)]
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = AutoConfig.from_pretrained(model).get_text_config()
    size = max(len(tokenizer), shape.vocab_size)
    counts = [count_tokens(some, tokenizer, size) for some in texts]
    names = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else "" for i in range(size)]
    weights_V = save_weights(to, [name or "" for name in names], counts[0], counts[1], frequencies)
    least = [names[i] for i in weights_V.argsort()[:8].tolist()]
    sizes = f"{int(counts[0].sum())} forget and {int(counts[1].sum())} retain tokens"
    print(f"{to}: {size} tokens from {sizes}; the lowest weights: {' '.join(map(repr, least))}")
