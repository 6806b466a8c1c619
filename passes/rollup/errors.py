"""The error of a loop over time that cannot be rolled up."""

from __future__ import annotations

from ..replace_neurons import ConversionError

__all__ = ["RollUpError"]


class RollUpError(ConversionError):
    """A loop over time that is not the same at every step; the message names the layer and what differs."""
