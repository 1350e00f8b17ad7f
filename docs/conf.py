"""Sphinx configuration; `make docs` builds with warnings as errors."""

from importlib.metadata import version as installed_version

project = "verl-grad-routing"
author = "The verl-grad-routing authors"
copyright = "2026, the verl-grad-routing authors"
version = release = installed_version(project)

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/*/report"]  # tables that pages show a part of

html_theme = "furo"
html_title = project
