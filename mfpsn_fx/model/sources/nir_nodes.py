"""Construction of the torch module of a node of an NIR graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import Surrogate

from .description import NotAFilterError
from .nir_neurons import NIRNeuron, nir_integrator

__all__ = ["node_module", "primitive_name"]


def primitive_name(node: object) -> str:
    """Return the name of the NIR primitive, '' if it is none, by class name: nir is not imported."""
    return type(node).__name__ if type(node).__module__.split(".")[0] == "nir" else ""


class _Scale(nn.Module):
    """Elementwise product with learnable factors of the shape of one step, (T·N, *) → (T·N, *)."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _linear(read: _Reader) -> nn.Module:
    weight = read.tensor("weight")
    if weight.ndim != 2:
        raise ValueError(f"{read}: weight must be (out, in), found {tuple(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=_has_bias(read))
    return read.with_parameters(layer)


def _convolution(kind: type[nn.Module]) -> Callable[[_Reader], nn.Module]:
    def make(read: _Reader) -> nn.Module:
        weight, groups = read.tensor("weight"), int(read.node.groups)
        dims = 1 if kind is nn.Conv1d else 2
        if weight.ndim != dims + 2:
            raise ValueError(f"{read}: weight must have {dims + 2} dimensions, found {tuple(weight.shape)}")
        layer = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), read.sizes("stride", dims),
            read.sizes("padding", dims), read.sizes("dilation", dims), groups, bias=_has_bias(read),
        )  # fmt: skip
        return read.with_parameters(layer)

    return make


def _has_bias(read: _Reader) -> bool:
    return getattr(read.node, "bias", None) is not None


def _pool(read: _Reader) -> nn.Module:
    # with a divisor of 1 the mean is a sum
    divisor = {"divisor_override": 1} if read.kind == "SumPool2d" else {}
    return nn.AvgPool2d(*(read.sizes(name, 2) for name in ("kernel_size", "stride", "padding")), **divisor)


def _flatten(read: _Reader) -> nn.Module:
    """Make the flatten layer; NIR counts the dims of one step without the batch: its 0 is torch's 1."""
    start, end = (int(d) + 1 if d >= 0 else int(d) for d in (read.node.start_dim, read.node.end_dim))
    return nn.Flatten(start, end)


_STATELESS: dict[str, Callable[[_Reader], nn.Module]] = {
    "Affine": _linear,
    "Linear": _linear,
    "Scale": lambda read: _Scale(read.tensor("scale")),
    "Conv1d": _convolution(nn.Conv1d),
    "Conv2d": _convolution(nn.Conv2d),
    "SumPool2d": _pool,
    "AvgPool2d": _pool,
    "Flatten": _flatten,
}


def _leaky(read: _Reader, tau: str = "tau") -> dict[str, Tensor]:
    decay_rate = read.decay_rate(tau)
    return {"decay": 1 - decay_rate, "gain": read.constant("r") * decay_rate, "rest": read.constant("v_leak")}


def _current(read: _Reader) -> dict[str, Tensor]:
    decay_rate = read.decay_rate("tau_syn")
    return {"current_decay": 1 - decay_rate, "current_gain": read.constant("w_in") * decay_rate}


def _without_leak(read: _Reader, rest: Tensor) -> dict[str, Tensor]:
    gain = read.constant("r") * read.dt
    return {"decay": torch.ones_like(gain), "gain": gain, "rest": rest}


def _threshold_and_reset(read: _Reader) -> dict[str, Tensor]:
    return {"threshold": read.constant("v_threshold"), "reset": read.constant("v_reset")}


def _threshold(read: _Reader) -> dict[str, Tensor]:
    """Return the coefficients of a neuron without memory."""
    threshold = read.constant("threshold")
    zero = torch.zeros_like(threshold)
    return {"decay": zero, "gain": zero + 1, "rest": zero, "threshold": threshold, "reset": zero}


_NEURONS: dict[str, Callable[[_Reader], dict[str, Tensor]]] = {
    "IF": lambda read: _without_leak(read, read.constant("v_reset")) | _threshold_and_reset(read),
    "LIF": lambda read: _leaky(read) | _threshold_and_reset(read),
    "CubaLIF": lambda read: _leaky(read, "tau_mem") | _current(read) | _threshold_and_reset(read),
    "Threshold": _threshold,
}
_INTEGRATORS: dict[str, Callable[[_Reader], dict[str, Tensor]]] = {
    "I": lambda read: _without_leak(read, torch.zeros_like(read.constant("r"))),
    "LI": _leaky,
    "CubaLI": lambda read: _leaky(read, "tau_mem") | _current(read),
}


class _Reader:
    """Reads one node's fields as torch values, with errors that name the node."""

    def __init__(self, name: str, node: object, dt: float, dtype: torch.dtype) -> None:
        self.name, self.node, self.dt, self.dtype = name, node, dt, dtype
        self.kind = primitive_name(node)

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.kind})"

    def constant(self, field: str) -> Tensor:
        """Copy a field in float64; ``ValueError`` if it is not finite."""
        value = torch.as_tensor(getattr(self.node, field)).detach().double().clone()
        if not bool(torch.isfinite(value).all()):
            hint = ": a node that never fires is an LI" if field in ("v_threshold", "threshold") else ""
            raise ValueError(f"{self}: {field} is NaN or infinite{hint}")
        return value

    def tensor(self, field: str) -> Tensor:
        """Copy a field in the network's dtype; ``ValueError`` if it is not finite."""
        return self.constant(field).to(self.dtype)

    def decay_rate(self, field: str) -> Tensor:
        """Return dt/τ; ``ValueError`` if it is above 1."""
        tau = self.constant(field)
        if bool((tau < self.dt).any()):
            raise ValueError(
                f"{self}: {field} is {float(tau.min()):g} s, but a step is dt = {self.dt:g} s, and a decay of "
                f"1 - dt/{field} must not be negative: give from_nir a dt of at most that"
            )
        return self.dt / tau

    def sizes(self, field: str, dims: int) -> tuple[int, ...] | str:
        """Return a field as ``dims`` integers, or a padding mode."""
        value = getattr(self.node, field)
        if isinstance(value, (str, bytes)):
            return value.decode() if isinstance(value, bytes) else value
        found = [int(v) for v in torch.as_tensor(value).flatten()]
        if len(found) not in (1, dims):
            raise ValueError(f"{self}: {field} must be 1 or {dims} integers, found {len(found)}")
        return tuple(found * dims if len(found) == 1 else found)

    def with_parameters(self, layer: nn.Module) -> nn.Module:
        """Copy weight and bias of the node into ``layer``, and return it."""
        layer = layer.to(self.dtype)
        for field in ("weight", "bias"):
            if (parameter := getattr(layer, field)) is None:
                continue
            value = self.tensor(field)
            if value.shape != parameter.shape:
                raise ValueError(f"{self}: {field} must be {tuple(parameter.shape)}, found {tuple(value.shape)}")
            with torch.no_grad():
                parameter.copy_(value)
        return layer


def node_module(
    name: str, node: object, dt: float, surrogate: Surrogate | None, dtype: torch.dtype
) -> tuple[nn.Module, bool]:
    """Return the node's module, and True if it is stateless, so that it takes (T·N, *) rather than (T, N, *).

    Args:
        name: of the node, for messages.
        node: an instance of an NIR primitive; its fields are copied.
        dt: the step in seconds.
        surrogate, dtype: as in :func:`mfpsn_fx.from_nir`.

    Raises:
        ValueError: the primitive is not supported, or its fields are invalid; the message names the node.
    """
    read = _Reader(name, node, dt, dtype)
    if read.kind in _STATELESS:
        return _STATELESS[read.kind](read), True
    if read.kind in _NEURONS:
        return NIRNeuron(read.kind, dtype, surrogate, **_broadcast(read, _NEURONS[read.kind](read))), False
    if read.kind in _INTEGRATORS:
        try:
            return nir_integrator(read.kind, dtype, **_broadcast(read, _INTEGRATORS[read.kind](read))), False
        except NotAFilterError as error:
            raise ValueError(f"{read}: {error}") from None
    supported = ", ".join([*_STATELESS, *_NEURONS, *_INTEGRATORS])
    raise ValueError(f"node {name!r} is a {type(node).__name__}, which is not supported; supported are {supported}")


def _broadcast(read: _Reader, coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Broadcast the coefficients to one shape."""
    try:
        tensors = torch.broadcast_tensors(*coefficients.values())
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in coefficients.values())
        raise ValueError(f"{read}: its constants have shapes that do not fit together: {shapes}") from None
    return {name: value.clone() for name, value in zip(coefficients, tensors, strict=True)}
