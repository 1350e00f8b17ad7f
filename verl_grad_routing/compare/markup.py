"""The parts of the page that both reports are made of: figures, lists, findings, the page around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from verl_grad_routing.compare.comparison import Finding

CLASSES = {True: "holds", False: "fails", None: "open"}
DEFINITIONS = {
    "hack": "share of all samples that the environment's grader calls a hack; each environment says what that is",
    "solve": "share of all samples that the grader calls truly right",
    "as trained": "both blocks on, as in the rollouts",
    "as deployed": "the quarantine block deleted; what this method ships",
    "known, unknown": "loophole types that the contrastive pairs show, and those that no label-free method ever sees",
}
CURVES_CAPTION = (
    "Hack rate (above) and true solve rate (below) against training steps. Marks: validation samples with 95% Wilson "
    "bars (several seeds: each run thin, mean thick, 95% t interval shaded). Thin unmarked lines: training rollouts, "
    "which always have the quarantine on."
)
DETECTOR_CAPTION = (
    "Training rollouts, step by step. AUROC of the detector's score against the grader's hack flag, which this metric "
    "alone reads; 0.5 (dotted) is chance; steps in which all or none hacked have none. Shares are of all rollouts."
)


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """The whole page; empty parts of ``body`` are left out."""
    template = Template(resources.files(__package__ or "").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), lead=escape(lead), body="\n".join(part for part in body if part))


def finding_list(findings: Sequence[Finding]) -> str:
    """Statements, marked by whether each is the one hoped for."""
    items = [f'<li class="{CLASSES[finding.holds]}">{escape(finding.text)}</li>' for finding in findings]
    return f'<ul class="findings">{"".join(items)}</ul>'


def figure(number: int, title: str, svg: str, caption: str) -> str:
    """A numbered figure, its drawing inlined."""
    return (
        f"<figure>{_inlined(svg, f'f{number}', title)}"
        f"<figcaption><b>Figure {number}. {escape(title)}.</b> {escape(caption)}</figcaption></figure>"
    )


def item_list(items: Sequence[str], kind: str) -> str:
    """Plain items."""
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def command(text: str) -> str:
    """A command line."""
    return f"<pre>{escape(text)}</pre>"


def _inlined(svg: str, prefix: str, title: str) -> str:
    """An SVG whose ids cannot meet those of another one on the page, with a name for screen readers."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title, quote=True)}" ', 1)
