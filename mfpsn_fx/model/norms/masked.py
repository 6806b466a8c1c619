"""Batch norms whose statistics exclude padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..padding_mask import current_mask
from ..recompute import RecomputeGuard
from ..sources.description import qualified_name
from ..time_last import has_hooks

__all__ = ["MaskedBatchNorm", "is_batch_norm", "mask_batch_norms", "replace_batch_norms"]

_HOMES = ("torch.nn.modules.batchnorm.", "spikingjelly.activation_based.layer.")
_NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


def is_batch_norm(module: nn.Module) -> bool:
    """Return True if ``module`` is exactly a BatchNorm1d, 2d or 3d of torch or SpikingJelly, not of a subclass."""
    name = qualified_name(type(module))
    return name.startswith(_HOMES) and name.rpartition(".")[2] in _NAMES


class MaskedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose batch statistics are over the steps that are valid under :func:`valid_steps`.

    Without a mask, and in evaluation, it computes the same as the batch norm that it was made from. Names in the
    ``state_dict`` are the same.

    Args:
        norm: a BatchNorm1d, 2d or 3d; its parameters and buffers are shared.

    Shapes: (T, N, C, *), or (T·N, C, *) with time flattened into the batch; the latter if the norm is torch's own or in
    SpikingJelly's step mode ``"s"``.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        nn.Module.__init__(self)  # not _BatchNorm's, whose new parameters and buffers would be replaced
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.time_first = getattr(norm, "step_mode", "s") == "m"
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self._recompute_guard = RecomputeGuard()
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalized; ``ValueError`` if the mask does not fit."""
        if self.time_first:
            return self._normalized(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self._normalized(x)

    def _normalized(self, x: Tensor) -> Tensor:
        mask = current_mask()
        batch_statistics = self.training or self.running_mean is None
        update = self.training and not self._recompute_guard.is_recompute(mask, self.training, "MaskedBatchNorm")
        if mask is None or not batch_statistics:
            momentum = self._momentum() if update else 0.0
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, batch_statistics, momentum, self.eps
            )
        if mask.numel() != x.shape[0]:
            raise ValueError(
                f"MaskedBatchNorm: a mask of shape (T, N) = {tuple(mask.shape)} needs an input of {mask.numel()} rows, "
                f"T and N as one, found shape {tuple(x.shape)}"
            )
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        valid = mask.reshape(-1, *([1] * (x.ndim - 1)))
        count = (mask.sum() * (x.numel() // max(x.shape[0] * x.shape[1], 1))).clamp(min=1)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        # not a product, in which NaN in the padding would survive
        wide = wide.masked_fill(~valid, 0)
        mean = wide.sum(dims) / count
        view = (-1, *([1] * (x.ndim - 2)))
        centered = (wide - mean.view(view)) * valid
        var = centered.square().sum(dims) / count
        if update and self.running_mean is not None:
            momentum = self._momentum() * (count > 1).to(self.running_mean.dtype)  # a single value has no variance
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        out = centered * torch.rsqrt(var + self.eps).view(view)
        if self.weight is not None:
            out = out * self.weight.view(view) + self.bias.view(view)
        return out.to(x.dtype)

    def _momentum(self) -> float | Tensor:
        if self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, time_first={self.time_first}"


def mask_batch_norms(model: nn.Module) -> int:
    """Replace each batch norm of ``model`` by a :class:`MaskedBatchNorm`, in place.

    Needed only to *train* with :func:`valid_steps`: batch norms would include padding. Parameters stay the same
    objects, so optimizers keep holding them.

    Returns:
        The number of batch norms that were replaced.

    Raises:
        TypeError: a batch norm is of an unsupported class (SyncBatchNorm, subclasses), or has hooks; then nothing is
            replaced.
    """
    model = getattr(model, "_orig_mod", model)
    return replace_batch_norms(model, MaskedBatchNorm, (MaskedBatchNorm,), is_batch_norm, "masked")


def replace_batch_norms(
    model: nn.Module,
    replacement: Callable[[nn.Module], nn.Module],
    skip: tuple[type[nn.Module], ...],
    supported: Callable[[nn.Module], bool],
    purpose: str,
) -> int:
    """Replace each batch norm of ``model`` by ``replacement(norm)``, in place; return how many were replaced.

    Args:
        replacement: called once for each batch norm, also if it is used in several places.
        skip: classes that are not replaced.
        supported: returns True if a batch norm can be replaced.
        purpose: a participle for the message, such as "masked".

    Raises:
        TypeError: a batch norm is not supported, or has hooks; then nothing is replaced.
    """
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, skip):
            continue
        if not supported(module) or not path:
            name = qualified_name(type(module))
            raise TypeError(
                f"{path or 'the model'}: {name} is not a batch norm that can be {purpose}; replace it yourself"
            )
        if has_hooks(module):
            raise TypeError(
                f"{path}: it has hooks or a forward of its own, which its replacement would not have; remove them first"
            )
        found.append((path, module))
    made = {module: replacement(module) for _, module in found}
    for path, module in found:
        model.set_submodule(path, made[module])
    return len(made)
