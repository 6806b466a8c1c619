"""The errors that passes raise."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ConversionError", "PipelineError", "RollUpError", "refusal_message"]


class ConversionError(ValueError):
    """Neurons that could not be converted; the message names each with the reason."""


class RollUpError(ConversionError):
    """A loop over time that is not the same at every step; the message names the layer and what differs."""


class PipelineError(ValueError):
    """Passes that need what no earlier pass gives; the message names every one."""


def refusal_message(failed: Mapping[str, str], total: int) -> str:
    """Return the message of a :class:`ConversionError` for ``failed`` (path -> reason) of ``total`` neurons."""
    lines = "\n".join(f"  {path}: {reason}" for path, reason in failed.items())
    return (
        f"{len(failed)} of {total} neurons cannot be converted:\n{lines}\n"
        "With strict=False they stay as they are and are listed in the selection."
    )
