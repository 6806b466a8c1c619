"""One batch of arguments of a network, from the forms in which data loaders yield it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .padding_mask import valid_steps
from .sources.description import source_paths

__all__ = ["Batch", "check_repeatable", "reset_states"]


class Batch:
    """One call of a network: its arguments, and the mask of valid steps if sequences differ in length.

    Args:
        args, kwargs: what the model is called with.
        mask: (T, N) of bool, or None; see :func:`valid_steps`.
    """

    def __init__(self, *args, mask: Tensor | None = None, **kwargs) -> None:
        self.args, self.kwargs, self.mask = args, kwargs, mask

    @classmethod
    def of(cls, value: object) -> Batch:
        """Make a batch of a tensor (the only argument), a tuple or list (arguments) or a mapping (keyword arguments).

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(value, Batch):
            return value
        if isinstance(value, Tensor):
            return cls(value)
        if isinstance(value, (tuple, list)):
            return cls(*value)
        if isinstance(value, Mapping):
            batch = cls()  # a model may have an argument called mask
            batch.kwargs = dict(value)
            return batch
        raise TypeError(
            f"a batch must be a tensor, a tuple or a dict of what the model takes, or an mfpsn_fx.Batch, "
            f"found {type(value).__name__}"
        )

    def run(self, model: nn.Module):
        """Return ``model(*args, **kwargs)``, called under the mask.

        Raises:
            TypeError: the model does not take such arguments.
        """
        try:
            inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            kinds = [type(value).__name__ for value in self.args] + list(self.kwargs)
            raise TypeError(
                f"a batch of {', '.join(kinds) or 'nothing'} does not fit what the network takes ({error}); "
                "labels are not part of it"
            ) from error
        with contextlib.nullcontext() if self.mask is None else valid_steps(self.mask):
            return model(*self.args, **self.kwargs)


def check_repeatable(batches: Iterable, purpose: str) -> None:
    """Raise unless ``batches`` can be iterated more than once.

    Raises:
        TypeError: ``batches`` is a tensor, no iterable, or a one-shot iterator.
    """
    if isinstance(batches, (Tensor, Mapping, Batch)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{purpose} takes an iterable of batches, found {type(batches).__name__}; put a single batch into a list"
        )
    if iter(batches) is batches:
        raise TypeError(
            f"{purpose} runs through the batches several times, and this {type(batches).__name__} can be run through "
            "once only: give a list or a DataLoader, e.g. list(batches)"
        )


def reset_states(model: nn.Module) -> None:
    """Reset the states of neurons that were not converted."""
    for module in source_paths(model).values():
        if callable(reset := getattr(module, "reset", None)):
            reset()
