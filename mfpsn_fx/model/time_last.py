"""Stateless layers on time-last tensors ``(N, C, *, T)`` (paper, appendix B).

The layer module is unchanged, with its name, parameters, statistics and mode; only the call is replaced:
``run_time_last(layer, x, method)`` instead of ``layer(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from mfpsn_fx.kernels.layout import to_layout

from .sources.description import qualified_name

__all__ = [
    "has_hooks",
    "has_registered_forms",
    "register_forms",
    "run_time_last",
    "shape_time_first",
    "time_last_methods",
    "unregister_forms",
]

Form = Callable[[nn.Module, Tensor], Tensor]

_SPIKINGJELLY = "spikingjelly.activation_based.layer."
_DIMS = {"1d": 1, "2d": 2, "3d": 3}


def run_time_last(layer: nn.Module, x: Tensor, method: str = "") -> Tensor:
    """Run ``layer`` on a sequence in time-last layout.

    Args:
        layer: a layer with a time-last form: those of :func:`time_last_methods`.
        x: (N, C, *, T); ``layer(x)`` would take (T, N, C, *).
        method: ``"wide"``: the layer with one more spatial dim, of size and stride 1 in T. ``"fold"``: T flattened into
            the batch and back, as ``torch.vmap`` over T does, in operations that ``torch.export`` can trace.
            ``"matmul"`` (linear layers) and ``"direct"`` (the others): no dims are moved. ``""``: the first that the
            layer has.

    Returns:
        (N, C', *', T), contiguous.

    A layer that has no such form, or no longer has it (after hooks, a parametrization or another padding mode were set,
    or it was sharded), is called as a module on the sequence converted to time-first and back: its hooks run, on the
    same values as without conversion.
    """
    if has_torch_function_unary(x):  # an fx.Proxy: stay one node of the graph when it is traced again
        if isinstance(x, fx.Proxy):
            layer = x.tracer.create_proxy("get_attr", x.tracer.path_of_module(layer), (), {})
        return handle_torch_function(run_time_last, (x,), layer, x, method)
    forms = {} if has_hooks(layer) else _forms(layer)
    form = forms.get(method or next(iter(forms), ""))
    if form is None:
        return to_layout(layer(to_layout(x, "time_last", "time_first")), "time_first", "time_last")
    return form(layer, x).contiguous()


def shape_time_first(x: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor (N, C, *, T) after conversion to (T, N, C, *)."""
    if has_torch_function_unary(x):
        return handle_torch_function(shape_time_first, (x,), x)
    return (x.shape[-1], *x.shape[:-1])


def time_last_methods(layer: nn.Module) -> tuple[str, ...]:
    """Return the methods by which ``layer`` can run on time-last tensors with its current settings; () if none."""
    return tuple(_forms(layer))


def has_hooks(m: nn.Module) -> bool:
    """Return True if calling ``m`` does more than its class's forward: hooks, or an instance attribute ``forward``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(m, name, None) for name in hooks) or "forward" in vars(m)


_REGISTERED: dict[str, dict[str, Form]] = {}  # forms of users, by qualified class name


def register_forms(name: str, forms: Mapping[str, Form]) -> None:
    """Register time-last forms, each called with (layer, x), for layers of the class with qualified name ``name``."""
    _REGISTERED[name] = dict(forms)


def unregister_forms(name: str) -> None:
    """Undo :func:`register_forms`."""
    _REGISTERED.pop(name, None)


def has_registered_forms(layer: nn.Module) -> bool:
    """Return True if a user registered time-last forms for layers of this class."""
    return qualified_name(type(layer)) in _REGISTERED


def _forms(layer: nn.Module) -> dict[str, Form]:
    name = qualified_name(type(layer))
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.startswith(_SPIKINGJELLY):
        if getattr(layer, "step_mode", "m") != "m":
            return {}
        return _spikingjelly_forms(type(layer).__name__, layer)
    if type(layer) is nn.Linear:
        return {"matmul": _linear, "fold": _linear_flattened}
    if type(layer) is nn.Flatten:
        return {"direct": _flatten} if layer.start_dim >= 2 and _ends_before_time(layer) else {}
    return {}


def _spikingjelly_forms(kind: str, layer: nn.Module) -> dict[str, Form]:
    """Return the forms of a SpikingJelly layer in step mode 'm': a torch.nn layer with T flattened into the batch."""
    dims = _DIMS.get(kind[-2:], 0)
    if kind in ("Conv1d", "Conv2d", "Conv3d"):
        wide = {"wide": _conv} if dims < 3 and layer.padding_mode == "zeros" else {}
    elif kind in ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"):
        wide = {"wide": _conv_transpose} if dims < 3 else {}
    elif kind in ("MaxPool1d", "MaxPool2d", "MaxPool3d"):
        if layer.return_indices:
            return {}
        wide = {"wide": _max_pool} if dims < 3 else {}
    elif kind in ("AvgPool1d", "AvgPool2d", "AvgPool3d"):
        wide = {"wide": _avg_pool} if dims < 3 else {}
    elif kind in ("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"):
        wide = {"wide": _adaptive_avg_pool} if dims < 3 else {}
    elif kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        return {"direct": _batch_norm}
    elif kind == "Linear":
        return {"matmul": _linear, "fold": _linear_flattened}
    elif kind == "Flatten":
        return {"direct": _flatten} if layer.start_dim >= 1 and _ends_before_time(layer) else {}
    elif kind in ("Dropout", "Dropout2d"):
        return {"direct": _dropout}
    elif kind in ("GroupNorm", "Upsample"):
        wide = {}
    else:
        return {}
    return {**wide, "fold": _flattened}


def _single_step_forward(layer: nn.Module) -> Form:
    """Return the forward of torch.nn's layer of the same name, which has no step mode."""
    return getattr(nn, type(layer).__name__).forward


def _flattened(layer: nn.Module, x: Tensor) -> Tensor:
    batch, steps = x.shape[0], x.shape[-1]
    y = _single_step_forward(layer)(layer, x.movedim(-1, 0).flatten(0, 1))
    return y.unflatten(0, (steps, batch)).movedim(0, -1)


def _with_time_dim(
    value: int | tuple[int | None, ...] | str | None, last: int, layer: nn.Module
) -> tuple[int, ...] | str:
    """Return a setting of the layer with one more dim, in which it is ``last``."""
    if isinstance(value, str):  # padding "same" or "valid" is 0 along T, where the kernel has size 1
        return value
    dims = _DIMS[type(layer).__name__[-2:]]
    return (*(value if isinstance(value, tuple) else (value,) * dims), last)


def _conv(layer: nn.Module, x: Tensor) -> Tensor:
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    stride, padding, dilation = (
        _with_time_dim(value, last, layer)
        for value, last in ((layer.stride, 1), (layer.padding, 0), (layer.dilation, 1))
    )
    return conv(x, layer.weight.unsqueeze(-1), layer.bias, stride, padding, dilation, layer.groups)


def _conv_transpose(layer: nn.Module, x: Tensor) -> Tensor:
    conv = F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d
    stride, padding, output_padding, dilation = (
        _with_time_dim(value, last, layer)
        for value, last in ((layer.stride, 1), (layer.padding, 0), (layer.output_padding, 0), (layer.dilation, 1))
    )
    return conv(x, layer.weight.unsqueeze(-1), layer.bias, stride, padding, output_padding, layer.groups, dilation)


def _max_pool(layer: nn.Module, x: Tensor) -> Tensor:
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    size, stride, padding, dilation = (
        _with_time_dim(value, last, layer)
        for value, last in ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0), (layer.dilation, 1))
    )
    return pool(x, size, stride, padding, dilation, layer.ceil_mode)


def _avg_pool(layer: nn.Module, x: Tensor) -> Tensor:
    size, stride, padding = (
        _with_time_dim(value, last, layer)
        for value, last in ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0))
    )
    if x.ndim == 4:
        return F.avg_pool2d(x, size, stride, padding, layer.ceil_mode, layer.count_include_pad)
    return F.avg_pool3d(
        x, size, stride, padding, layer.ceil_mode, layer.count_include_pad, getattr(layer, "divisor_override", None)
    )


def _adaptive_avg_pool(layer: nn.Module, x: Tensor) -> Tensor:
    pool = F.adaptive_avg_pool2d if x.ndim == 4 else F.adaptive_avg_pool3d
    return pool(x, _with_time_dim(layer.output_size, x.shape[-1], layer))


def _batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Run the norm with T merged into the last dim of *: its statistics are over N, * and T in any case."""
    norm = _single_step_forward(layer)
    if x.ndim == 3:
        return norm(layer, x)
    return norm(layer, x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    y = torch.matmul(layer.weight, x)
    return y if layer.bias is None else y + layer.bias.unsqueeze(-1)


def _linear_flattened(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.transpose(-1, -2), layer.weight, layer.bias).transpose(-1, -2)


def _ends_before_time(layer: nn.Module) -> bool:
    """Return True if a flatten of the channel and inner dims does not include T."""
    return layer.end_dim == -1 or layer.end_dim >= layer.start_dim


def _flatten(layer: nn.Module, x: Tensor) -> Tensor:
    # SpikingJelly counts the dims of one step (N, C, *), torch.nn those of the sequence (T, N, C, *)
    before = 0 if qualified_name(type(layer)).startswith(_SPIKINGJELLY) else 1
    return x.flatten(layer.start_dim - before, -2 if layer.end_dim == -1 else layer.end_dim - before)


def _dropout(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply one mask to all steps, kept until the network is reset, as SpikingJelly does."""
    if not layer.training:
        return x
    if layer.mask is None:
        layer.mask = layer.create_mask(x[..., 0].contiguous())
    return x * layer.mask.unsqueeze(-1)
