"""Weights of tokens by their frequencies in two kinds of text: which tokens of a flagged text count.

Most tokens of a flagged text occur everywhere. Cloud et al. (arXiv 2410.04332, Expand-Route-Ablate) weigh each token by
the ratio of its frequencies in forget and retain texts, with pseudo-counts for tokens hardly seen::

    p(v) = (count(v) + pseudo) / sum_u (count(u) + pseudo)        in forget and in retain texts
    ratio = p_forget / p_retain
    w     = 1 - sigmoid(scale (ratio - 1 / ratio) + bias)         1: as any other token; 0: of forget texts alone
    alpha = alpha_routed (1 - w) + w                              factor on the gradient where v is *predicted*

Defaults are those of their TinyStories code: 1 forget and 20 retain pseudo-counts, scale 1, bias -4, where a token that
is as frequent in both has w = .982. ``vgr token-weights`` writes the file, intervention ``cloud`` reads it.

Legend: ``V`` size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.errors import UserError

COLUMNS = ("token_id", "token", "forget_count", "retain_count", "weight")


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """How counts become weights; the module's docstring has the equation."""

    forget_pseudo: float = 1.0  # added to every token's count in the forget texts
    retain_pseudo: float = 20.0  # the same in the retain texts
    scale: float = 1.0
    bias: float = -4.0

    def __post_init__(self) -> None:
        for name in ("forget_pseudo", "retain_pseudo", "scale"):
            require_number(name, getattr(self, name), 0)
            if getattr(self, name) == 0:
                raise UserError(name, 0, "give a positive number")
        require_number("bias", self.bias)

    def weights(self, forget_V: Tensor, retain_V: Tensor) -> Tensor:
        """w of every token, float64 [V] in [0, 1], from its counts in both kinds of text."""
        forget, retain = forget_V.double() + self.forget_pseudo, retain_V.double() + self.retain_pseudo
        ratio = (forget / forget.sum()) / (retain / retain.sum())
        return torch.sigmoid(-(self.scale * (ratio - 1 / ratio) + self.bias))


def read_texts(path: Path, column: str = "text") -> list[str]:
    """Texts of a file: the ``column`` of a parquet, or the lines of any other that are not empty.

    Raises:
        UserError: No such file or column, or no text in it.
    """
    if not path.is_file():
        raise UserError("texts", str(path), "no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise UserError("texts", str(path), f"it has no column {column!r}, but {', '.join(names)}; give --column")
        found = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    else:
        found = path.read_text(encoding="utf-8").splitlines()
    texts = [text for text in found if text]
    if not texts:
        raise UserError("texts", str(path), "there is no text in it")
    return texts


def count_tokens(texts: Iterable[str], tokenizer: Any, size: int) -> Tensor:
    """How often every token id occurs in ``texts``, int64 [size], special tokens not added."""
    counts = torch.zeros(size, dtype=torch.int64)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=size)
    return counts


def save_weights(path: Path, tokens: list[str], forget_V: Tensor, retain_V: Tensor, frequencies: Frequencies) -> Tensor:
    """Write counts and weights, one row a token; returns the weights [V]."""
    import pyarrow
    import pyarrow.parquet

    weights_V = frequencies.weights(forget_V, retain_V)
    columns = (list(range(len(tokens))), tokens, forget_V.tolist(), retain_V.tolist(), weights_V.tolist())
    table = pyarrow.table(dict(zip(COLUMNS, columns, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata({"frequencies": repr(frequencies)}), path)
    return weights_V


def load_weights(key: str, path: str) -> Tensor:
    """Weights of token ids 0..V-1, float32 [V], from the columns ``token_id`` and ``weight`` of a parquet.

    Args:
        key: The configuration key, for messages.

    Raises:
        UserError: No such file, no such columns, ids that are not 0..V-1 in order, or a weight outside [0, 1].
    """
    import pyarrow
    import pyarrow.parquet

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(key, path, "no such file; write it with vgr token-weights MODEL --forget FILE --retain FILE")
    try:
        table = pyarrow.parquet.read_table(file, columns=["token_id", "weight"])
    except (pyarrow.ArrowException, KeyError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(key, path, f"not a table of token weights ({told}); write it with vgr token-weights") from None
    ids, weights = table["token_id"].to_pylist(), table["weight"].to_pylist()
    if ids != list(range(len(ids))) or not ids:
        raise UserError(key, path, "token_id must count 0, 1, 2, ... in order; write it with vgr token-weights")
    wrong = next((i for i, w in enumerate(weights) if w is None or not 0 <= w <= 1), None)
    if wrong is not None:
        raise UserError(f"{key} of token {wrong}", weights[wrong], "give weights in [0, 1]")
    return torch.tensor(weights, dtype=torch.float32)


def predicted_weights(weights_V: Tensor, rows: Iterable[Tensor]) -> list[Tensor]:
    """At every position of a row of token ids [L] the weight of the token after it, float32 [L]; 1 at the last.

    Raises:
        UserError: A token that the table does not know.
    """
    found = []
    for ids_L in rows:
        if len(ids_L) and int(ids_L.max()) >= len(weights_V):
            fix = f"the table has {len(weights_V)} tokens; write it anew with the model that is trained"
            raise UserError("grad_routing.intervention.token_weights", int(ids_L.max()), fix)
        found.append(torch.cat((weights_V[ids_L[1:].cpu()], torch.ones(min(len(ids_L), 1)))))
    return found
