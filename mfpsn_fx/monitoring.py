"""Firing rates of a network while it runs."""

from __future__ import annotations

import dataclasses

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.padding_mask import current_mask

__all__ = ["LayerRates", "Monitor", "monitor"]


@dataclasses.dataclass(frozen=True)
class LayerRates:
    """One layer's firing rate per channel (C,), and its silent and saturated channels (C,) of bool.

    ``steps`` is the number of valid steps, summed over the batch.
    """

    rates: Tensor
    silent: Tensor
    saturated: Tensor
    steps: int

    @property
    def rate(self) -> float:
        """The mean over channels: spikes per neuron and step."""
        return float(self.rates.mean())


class _Count:
    """A layer's running sums, on its device: spikes per channel, values per channel, valid steps."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.spikes = torch.zeros(channels, dtype=torch.float64, device=device)
        self.values = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)


class Monitor:
    """Spike counts of each neuron layer, from construction until ``close()``; see :func:`monitor`."""

    def __init__(self, model: nn.Module, silent: float, saturated: float) -> None:
        self._silent, self._saturated = silent, saturated
        self._names: dict[int, str] = {}
        self._counts: dict[str, _Count] = {}
        self._handles = []
        for path, module in model.named_modules():
            if isinstance(module, MulFreePSN):
                self._names[id(module)] = path or type(module).__name__
                self._handles.append(module.register_forward_hook(self._count, with_kwargs=True))

    @torch.no_grad()
    def _count(self, module: MulFreePSN, args: tuple, kwargs: dict, spikes: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:  # a checkpointed layer that is recomputed in backward
            return
        layout = Layout.parse(kwargs.get("layout") or module.layout)
        given = args[1] if len(args) > 1 else kwargs.get("mask")
        mask = current_mask() if given is None else given
        name = self._names[id(module)]
        if name not in self._counts:
            self._counts[name] = _Count(module.channels, spikes.device)
        count = self._counts[name]
        spikes = module.channels_together(spikes.detach(), layout)
        channel = layout.channel_dim
        # on the device only: reading a value here would make the host wait in every forward
        count.spikes += spikes.sum([d for d in range(spikes.ndim) if d != channel], dtype=torch.float64)
        steps = spikes.shape[layout.time_dim] * spikes.shape[layout.batch_dim]
        units = spikes.numel() // max(steps * module.channels, 1)
        valid = steps if mask is None else mask.sum()
        count.steps += valid
        count.values += valid * units

    def layers(self) -> dict[str, LayerRates]:
        """Return the rates of each layer that was called."""
        found = {}
        for name in self._names.values():
            if (count := self._counts.get(name)) is not None and count.values > 0:
                rates = count.spikes / count.values
                found[name] = LayerRates(
                    rates.float(), rates <= self._silent, rates >= self._saturated, int(count.steps)
                )
        return found

    def rates(self) -> dict[str, Tensor]:
        """Return each layer's firing rates per channel: (C,) of float32, on the layer's device."""
        return {name: layer.rates for name, layer in self.layers().items()}

    def scalars(self, prefix: str = "") -> dict[str, Tensor]:
        """Return scalars to log: ``<layer>/rate``, and ``<layer>/silent`` and ``/saturated``, shares of channels."""
        scalars = {}
        for name, layer in self.layers().items():
            scalars[f"{prefix}{name}/rate"] = layer.rates.mean()
            scalars[f"{prefix}{name}/silent"] = layer.silent.float().mean()
            scalars[f"{prefix}{name}/saturated"] = layer.saturated.float().mean()
        return scalars

    def table(self, style: str = "simple") -> str:
        """Return a table with a row for each layer; ``style`` is any of tabulate's formats."""
        headers = ["layer", "channels", "rate", "lowest", "highest", "silent", "saturated"]
        found = self.layers()
        body = []
        for name in self._names.values():
            if (layer := found.get(name)) is None:
                body.append([name, "", "not called", "", "", "", ""])
                continue
            numbers = (layer.rate, float(layer.rates.min()), float(layer.rates.max()))
            body.append([name, len(layer.rates), *(f"{v:.4f}" for v in numbers), int(layer.silent.sum()),
                         int(layer.saturated.sum())])  # fmt: skip
        return tabulate(body, headers, tablefmt=style, disable_numparse=True)

    def __str__(self) -> str:
        return self.table()

    def reset(self) -> None:
        """Set all counts to zero."""
        self._counts.clear()

    def close(self) -> None:
        """Remove the hooks and keep the counts. Closing again does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def monitor(model: nn.Module, *, silent: float = 0.0, saturated: float = 1.0) -> Monitor:
    """Count the spikes of every neuron layer of ``model``, in its graph and inside leaves.

    ::

        with mfpsn_fx.monitor(model) as rates:
            model(x)
        print(rates)  # a table
        logger.log(rates.scalars())

    Steps that a mask excludes do not count. Counting does not synchronize with the device; reading the rates does.

    Args:
        model: a network with ``MulFreePSN`` neurons.
        silent: channels that fire at this rate or less are silent.
        saturated: channels that fire at this rate or more are saturated.

    Returns:
        A :class:`Monitor`, a context manager; or call its ``close()``.

    Raises:
        TypeError: there is no such neuron, or the model is compiled: torch.compile ignores hooks that are added later.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "a compiled network ignores hooks that are added after compilation: monitor and run the network that was "
            "given to torch.compile"
        )
    monitored = Monitor(model, silent, saturated)
    if not monitored._names:
        raise TypeError(f"{type(model).__name__} has no MulFreePSN neuron to monitor")
    return monitored
