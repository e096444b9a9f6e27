"""Where the command lines write."""

from __future__ import annotations

from rich.console import Console

out, err = Console(), Console(stderr=True)
if not out.is_terminal:
    out.width = 160  # a file or a pipe has no width of its own
