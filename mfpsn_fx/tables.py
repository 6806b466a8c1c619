"""Tables as plain text, Markdown and HTML, with footers."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tabulate import tabulate, tabulate_formats

__all__ = ["check_style", "format_table"]

_NAMES = {"plain": "simple"}  # our name: tabulate's


def check_style(style: str) -> None:
    """Raise ``ValueError`` unless ``style`` is known; tabulate would silently use another one."""
    if style not in _NAMES and style not in tabulate_formats:
        raise ValueError(
            f"unknown style {style!r}: choose 'plain', 'github' or 'html', or another of tabulate's formats "
            f"({', '.join(tabulate_formats)})"
        )


def format_table(
    body: Sequence[Sequence[object]],
    headers: Sequence[str],
    style: str,
    footer: Sequence[str] = (),
    align: Sequence[str] | None = None,
) -> str:
    """Return the table in ``style``, with the lines of ``footer`` below it, as a list in Markdown and HTML.

    Cells and footer are plain text and are escaped: ``|`` in Markdown tables, ``<`` in HTML.
    """
    if style in ("github", "pipe"):
        body = [[str(cell).replace("|", "\\|") for cell in row] for row in body]
    text = tabulate(
        body, headers, tablefmt=_NAMES.get(style, style), disable_numparse=True, colalign=align if body else None
    )
    if not footer:
        return text
    if style in ("github", "pipe"):
        return "\n".join([text, "", *(f"- {line}" for line in footer)])
    if style in ("html", "unsafehtml"):
        return "\n".join([text, "<ul>", *(f"<li>{html.escape(line)}</li>" for line in footer), "</ul>"])
    return "\n".join([text, "", *footer])
