"""A page in headless Chromium: what it measures of itself there, and pictures of it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# The rest of the flags keep it from calling home.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
LIMIT_S = 60
# Runs in the page; its answer is left where --dump-dom finds it.
MEASURE = """<script>
addEventListener("load", () => {
  const boxes = (selector) => [...document.querySelectorAll(selector)].map((element) => {
    const box = element.getBoundingClientRect();
    return {x: box.x, y: box.y + scrollY, width: box.width, height: box.height};
  });
  document.body.dataset.measured = JSON.stringify({
    width: innerWidth, needed: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    text: document.body.innerText, figures: boxes("figure svg"), captions: boxes("figcaption"), tables: boxes("table"),
    cut: [...document.querySelectorAll(".scroll")].filter((element) => element.scrollWidth > element.clientWidth)
      .map((element) => element.innerText.slice(0, 60)),
  });
});
</script></body>"""


def browser() -> str:
    """Chromium's path; skips the test where there is none, but never in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert not os.environ.get("CI"), "CI looks at pages: scripts/install.sh installs chromium"
        pytest.skip("looks at a page in Chromium: apt-get install chromium")
    return found


def _run(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), *FLAGS, f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return done.stdout


def measured(page: Path, width: int, paper: bool = False) -> dict[str, Any]:
    """Sizes and visible text of ``page`` in a window ``width`` pixels wide; boxes in pixels from its top left.

    ``paper`` takes the page's rules for printing; ``cut`` are the tables that have to be scrolled sideways.
    """
    copy, text = page.with_name(f"measured-{page.name}"), page.read_text(encoding="utf-8")
    if paper:
        text = text.replace("@media print", "@media all")
    copy.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    dom = _run(f"--window-size={width},900", "--dump-dom", copy.as_uri())
    copy.unlink()
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found is not None, "the page did not load"
    return json.loads(html.unescape(found[1]))


def picture(page: Path, width: int, height: int) -> np.ndarray:
    """The page's first ``height`` pixels, [height, width, 3] bytes."""
    shot = page.with_suffix(".png")
    _run(f"--window-size={width},{height}", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        return np.asarray(image.convert("RGB"))


def printed(page: Path) -> int:
    """Sheets of paper that it takes."""
    sheet = page.with_suffix(".pdf")
    _run(f"--print-to-pdf={sheet}", "--no-pdf-header-footer", page.as_uri())
    return len(re.findall(rb"/Type\s*/Page\b", sheet.read_bytes()))
