"""Make docs/reference/options.md from the options' own descriptions.

Run with ``python docs/reference/make.py``; a test holds the page to what this makes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from tabulate import tabulate

from mfpsn_fx import ConvertOptions, MeasureOptions

PAGE = pathlib.Path(__file__).with_name("options.md")


def page() -> str:
    """Return the page as Markdown."""
    measured = {field.name for field in dataclasses.fields(MeasureOptions)}
    fields = dataclasses.fields(ConvertOptions)
    parts = [
        "# Options",
        "Made by `python docs/reference/make.py` from the dataclasses `mfpsn_fx.ConvertOptions` and "
        "`mfpsn_fx.MeasureOptions`, which check themselves and have a JSON form (`to_json`, `from_json`). "
        "`convert(model, x, order=4)` takes them by name, `convert(model, x, options=ConvertOptions(order=4))` as a "
        "value; options given by name take precedence.",
        "## Of `convert` alone",
        _table([field for field in fields if field.name not in measured]),
        "## Of `convert` and `plan`",
        _table([field for field in fields if field.name in measured]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(fields: list[dataclasses.Field]) -> str:
    rows = [[f"`{f.name}`", f"`{f.default!r}`", _markdown(f.metadata["doc"])] for f in fields]
    return tabulate(rows, ["option", "default", "meaning"], tablefmt="github", disable_numparse=True)


def _markdown(text: str) -> str:
    """Text with reStructuredText's literals and roles, in Markdown, on one line of a table."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"\(docs/(\w+)/(\w+)\.md\)", r"([\2](../\1/\2.md))", text)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
