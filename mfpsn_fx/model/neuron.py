"""The multiplication-free channel-wise parallel spiking neuron as a module."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.bn_fold import Fold, fold
from mfpsn_fx.kernels.constants import ALL, FOLDING, NeuronConstants
from mfpsn_fx.kernels.eager import run_layer
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.op import neuron
from mfpsn_fx.kernels.quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, check_exponent_bounds
from mfpsn_fx.kernels.registry import Problem, default_kernel, get_kernel
from mfpsn_fx.kernels.surrogate import ATan, Surrogate, get_surrogate

from .channel_dims import DEFAULT_DIMS, channels_back, channels_together, check_dims
from .distributed.group import Group, active_group
from .distributed.neuron import neuron_over_ranks
from .padding_mask import current_mask
from .recompute import RecomputeGuard
from .results import Calibrated, ConversionRecord
from .sources.description import SourceNeuron

__all__ = ["MulFreePSN"]

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class MulFreePSN(nn.Module):
    """S = Θ(BN(H)) with H[t][c] = Σ_i W[c][i] · X[t − (k−1−i)·d][c] (paper, equations 10, 17, 18, appendix C).

    Training normalizes with the batch statistics of the unquantized filter, folds them into the weights, quantizes
    those to powers of two, and fires; gradients flow through mean and variance. Evaluation uses the running
    statistics: shifts, additions, one comparison with the threshold −b_f.

    Args:
        channels: C.
        order: k, the number of taps. ``weight[:, k−1]`` multiplies the current step.
        dilation: d, the distance between taps in steps. Taps before t = 0 read zeros.
        surrogate: replaces the derivative of Θ in backward.
        gradient: of the quantizer: ``"straight-through"`` (16), ``"round-only"`` (15) or ``"none"`` (no quantizer).
        layout: of the input unless passed to the call: ``"time_first"`` (T, N, C, *) or ``"time_last"`` (N, C, *, T).
        eps, momentum: as in ``torch.nn.BatchNorm1d``.
        min_exponent, max_exponent: bounds on the exponents of the quantized weights, within −126 … 127.
        channel_dims: the dims of the input that hold its channels, counted in time-first order: 2, another one, or
            several that are merged, such as (2, 3) of (T, N, heads, width, L).

    Shapes: input (T, N, C, *) or (N, C, *, T), floating point; output the same, of zeros and ones. Parameters
    ``weight`` (C, k), ``gamma`` (C,) = 1, ``beta`` (C,) = −1; buffers ``running_mean``, ``running_var`` (C,). They
    stay float32 when the model is moved to half precision, and become float64 with it.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        channels: int,
        order: int = 2,
        dilation: int = 1,
        *,
        surrogate: Surrogate | None = None,
        gradient: Gradient | str = Gradient.STRAIGHT_THROUGH,
        layout: Layout | str = Layout.TIME_FIRST,
        eps: float = 1e-5,
        momentum: float = 0.1,
        min_exponent: int = MIN_EXPONENT,
        max_exponent: int = MAX_EXPONENT,
        channel_dims: int | tuple[int, ...] = DEFAULT_DIMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("order", order), ("dilation", dilation)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"MulFreePSN: {name} must be an integer of at least 1, found {value!r}")
        if not (0 <= momentum <= 1 and eps > 0):
            raise ValueError(f"MulFreePSN: eps must be positive and momentum in [0, 1], found {eps} and {momentum}")
        check_exponent_bounds(min_exponent, max_exponent)
        surrogate = ATan() if surrogate is None else surrogate
        get_surrogate(surrogate.name, surrogate.alpha)
        if dtype in _LOW_PRECISION:
            dtype = torch.float32
        self.channels, self.order, self.dilation = channels, order, dilation
        self.surrogate = surrogate
        self.gradient = str(Gradient.parse(gradient))
        self.layout = str(Layout.parse(layout))
        self.eps, self.momentum = eps, momentum
        self.channel_dims = check_dims(channel_dims)
        self.min_exponent, self.max_exponent = min_exponent, max_exponent
        # defaults for calls that pass no kernel, such as those inside of a leaf; "": not bound
        self.kernel = self.eval_kernel = ""
        self.path = ""  # the name of this layer in messages
        self.source: SourceNeuron | None = None
        self.conversion_record: ConversionRecord | None = None  # of the network, shared by its neurons
        self.calibrated: Calibrated | None = None  # the result of calibration, if there was one
        self.ranks: Group | None = None  # batch statistics are taken over these ranks; None: this process alone
        self._recompute_guard = RecomputeGuard()
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(channels, order, **factory))
        self.gamma = nn.Parameter(torch.ones(channels, **factory))
        self.beta = nn.Parameter(torch.full((channels,), -1.0, **factory))
        self.register_buffer("running_mean", torch.zeros(channels, **factory))
        self.register_buffer("running_var", torch.ones(channels, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize W as a depthwise convolution (uniform in ±1/√k), γ = 1, β = −1, running statistics (0, 1)."""
        with torch.no_grad():
            bound = 1 / math.sqrt(self.order)
            self.weight.uniform_(-bound, bound)
            self.gamma.fill_(1)
            self.beta.fill_(-1)
            self.running_mean.zero_()
            self.running_var.fill_(1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        layout: str | None = None,
        kernel: str | None = None,
        eval_kernel: str | None = None,
    ) -> Tensor:
        """Return the spikes of ``x``.

        Args:
            x: (T, N, C, *) or (N, C, *, T), as ``layout`` says.
            mask: (T, N) of bool, the steps that are valid; others are read as zero, are excluded from statistics and
                do not fire. None: that of :func:`mfpsn_fx.valid_steps`, if there is one.
            scale, shift: (C,), or None for 1 and 0: the neuron's input is scale · x + shift, computed on load and never
                stored. Steps before the first, and those that are not valid, are zero after that.
            layout, kernel, eval_kernel: this call's binding; None for the module's own. A kernel ``""`` is the one of
                highest rank that can serve the input.

        Raises:
            TypeError: x is not floating point.
            ValueError: rank or channels do not fit, or there is one value per channel in training.
            RuntimeError: a checkpointed layer is recomputed, possibly with another mask than in its first run.
        """
        mask = current_mask() if mask is None else mask
        recompute = self._recompute_guard.is_recompute(mask, self.training, self.path or "MulFreePSN")
        chosen = (
            (self.kernel if kernel is None else kernel)
            if self.training
            else (self.eval_kernel if eval_kernel is None else eval_kernel)
        )
        layout = self.layout if layout is None else layout
        shape = x.shape
        x = self.channels_together(x, layout)
        spikes = self._fired(x, scale, shift, mask, self.training and not recompute, self.constants(layout, chosen))
        if self.channel_dims != DEFAULT_DIMS:
            spikes = channels_back(spikes, self.channel_dims, layout, shape)
        return spikes

    def constants(self, layout: str | None = None, kernel: str = "") -> NeuronConstants:
        """Return the op's non-tensor arguments, under ``layout`` (default: the module's own) on ``kernel``."""
        # Dynamo cannot use the cache of checked(), nor check symbolic numbers; the op itself checks in any case
        make = NeuronConstants if torch.compiler.is_compiling() else NeuronConstants.checked
        return make(
            eps=self.eps,
            surrogate=self.surrogate.name,
            alpha=self.surrogate.alpha,
            gradient=self.gradient,
            min_exponent=self.min_exponent,
            max_exponent=self.max_exponent,
            training=self.training,
            dilation=self.dilation,
            layout=self.layout if layout is None else layout,
            method=kernel,
            layer=self.path,
        )

    def _fired(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mask: Tensor | None,
        update: bool,
        constants: NeuronConstants,
    ) -> Tensor:
        """Return the spikes; if ``update``, update the running statistics with the batch's."""
        group = active_group(self) if self.training else None
        if group is not None:
            spikes, mean, var, count = neuron_over_ranks(
                group, x, self.weight, self.gamma, self.beta, scale, shift, mask, constants
            )
        else:
            tensors = (x, self.weight, self.gamma, self.beta, self.running_mean, self.running_var, scale, shift)
            if mask is None:
                spikes = run_layer(*tensors, self.momentum, update, constants)
                if spikes is not None:
                    return spikes
            spikes, mean, var = neuron(*tensors, mask, **constants.arguments(ALL))
            count = None
        if update:
            self._update_statistics(mean, var, self._count(x, mask) if count is None else count)
        return spikes

    def channels_together(self, x: Tensor, layout: str) -> Tensor:
        """Return ``x`` as the kernels take it, (T, N, C, *) or (N, C, *, T), with ``channel_dims`` merged into C."""
        if self.channel_dims == DEFAULT_DIMS:
            return x
        if max(self.channel_dims) >= x.ndim:
            raise ValueError(
                f"{self.path or 'MulFreePSN'}: its channels are dims {self.channel_dims} of a time-first input, but "
                f"the input has shape {tuple(x.shape)}"
            )
        return channels_together(x, self.channel_dims, layout)

    def _count(self, x: Tensor, mask: Tensor | None) -> Tensor | int:
        count = x.numel() // self.channels
        return count if mask is None else mask.sum() * (count // mask.numel())

    def _update_statistics(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        momentum: float | Tensor = self.momentum
        if isinstance(count, Tensor):
            unbiased = var * (count / (count - 1).clamp(min=1))
            momentum = momentum * (count > 1).to(self.running_mean.dtype)  # a single value has no variance
        else:
            unbiased = var * (count / (count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            # neither requires grad: the op's statistics are not differentiable
            running.lerp_(batch if batch.dtype is running.dtype else batch.to(running.dtype), momentum)

    def folded(self) -> Fold:
        """Return the taps W_q (C, k) and bias b_f (C,) of evaluation (appendix C), and their intermediate values."""
        with torch.no_grad():
            tensors = (self.weight, self.gamma, self.beta, self.running_mean, self.running_var)
            return fold(*tensors, **self.constants().arguments(FOLDING))

    def bind(self, *, layout: str | None = None, kernel: str | None = None, eval_kernel: str | None = None) -> None:
        """Set this module's default layout and kernels; ``ValueError`` if one is unknown."""
        if layout is not None:
            self.layout = str(Layout.parse(layout))
        if kernel is not None:
            self.kernel = kernel and get_kernel(kernel).name
        if eval_kernel is not None:
            self.eval_kernel = eval_kernel and get_kernel(eval_kernel).name

    def default_kernel(self, layout: str | None = None, training: bool = True) -> str:
        """Return the kernel that runs if none is bound: that of highest rank, for a small input of the weight's dtype.

        Nothing is compiled: kernels that have to be built are assumed to be available until the first call.
        """
        constants = dataclasses.replace(self.constants(layout), training=training)
        shape = constants.parsed_layout.shape_from((4, 2, self.channels, 1), Layout.TIME_FIRST)
        problem = Problem.of(constants, shape, self.weight.dtype, self.weight.device.type, self.order)
        return default_kernel(problem, build=False).name

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype in _LOW_PRECISION:
                return t.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        text = (
            f"{self.channels}, order={self.order}, dilation={self.dilation}, "
            f"surrogate={type(self.surrogate).__name__}({self.surrogate.alpha:g}), gradient={self.gradient!r}, "
            f"layout={self.layout!r}, eps={self.eps:g}, momentum={self.momentum:g}"
        )
        if self.channel_dims != DEFAULT_DIMS:
            text += f", channel_dims={self.channel_dims}"
        if (self.min_exponent, self.max_exponent) != (MIN_EXPONENT, MAX_EXPONENT):
            text += f", min_exponent={self.min_exponent}, max_exponent={self.max_exponent}"
        if self.kernel or self.eval_kernel:
            text += f", kernel={self.kernel!r}, eval_kernel={self.eval_kernel!r}"
        else:
            text += f", kernel={self.default_kernel()!r} by rank"
        if self.source is not None:
            text += f", source={self.source.name}"
        return text
