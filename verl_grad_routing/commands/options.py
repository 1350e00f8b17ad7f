"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Chat = Annotated[
    list[str] | None,
    typer.Option(
        "--chat", help="Switch of the chat template, as in the run (data.apply_chat_template_kwargs): key=value."
    ),
]
