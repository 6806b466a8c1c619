"""``convert`` and ``plan``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx, nn

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import get_kernel
from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.capture import capture, copied, said_of
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.over_time import OverTime
from mfpsn_fx.model.source import source_paths
from mfpsn_fx.model.step_mode import Switched, to_multi_step
from mfpsn_fx.model.stepping import is_stepping
from mfpsn_fx.passes import (
    AssignDilations,
    Autoselect,
    BindKernels,
    Calibrate,
    CancelConversions,
    CheckSources,
    ConversionError,
    FoldNorms,
    InitialiseNeurons,
    InsertConversions,
    ObserveInputs,
    Pipeline,
    PlanLayout,
    PropagateShapes,
    ReplaceNeurons,
    SeparateUses,
    UnfoldNorms,
    VerifyPlan,
)
from mfpsn_fx.passes.autoselect import check_budget
from mfpsn_fx.passes.plan_layout import RULES
from mfpsn_fx.passes.replace_neurons import REFUSED
from mfpsn_fx.passes.rollup.roll_up import check_accept

from .replay import choices_of
from .selection import Selection, graph_of, unwrapped
from .single_step import has_steps, rolled_loop, rolled_up

__all__ = ["conversion_pipeline", "convert", "plan", "planning_pipeline"]


def conversion_pipeline(
    args: tuple = (),
    kwargs: Mapping | None = None,
    *,
    order: int = 2,
    dilation: str | int | Sequence[int] = "sawtooth",
    layout: str = "auto",
    kernels: str | Mapping[str, str] = "auto",
    init: str = "source",
    calibrate: Iterable | None = None,
    strict: bool = True,
    surrogate: Surrogate | None = None,
    gradient: str = "straight-through",
    channel_dims: Mapping[str, int | tuple[int, ...]] | None = None,
    fold_norms: bool = True,
    repeats: int = 5,
    progress: bool | None = None,
    budget_s: float = 10.0,
    cache: bool = True,
    selection: Selection | str | os.PathLike | None = None,
    verify: bool | str = False,
) -> Pipeline:
    """The passes that :func:`convert` runs on a captured graph; arguments as there."""
    kwargs = dict(kwargs or {})
    passes = [
        CheckSources(strict),
        ObserveInputs(args, kwargs),
        SeparateUses(),
        ReplaceNeurons(order, surrogate=surrogate, gradient=gradient, strict=strict, channel_dims=channel_dims),
        AssignDilations(dilation),
        InitialiseNeurons(init, args, kwargs),
    ]
    if calibrate is not None:
        passes.append(Calibrate(calibrate, progress=progress))
    if args or kwargs:
        passes += planning_pipeline(
            args, kwargs, layout=layout, kernels=kernels, fold_norms=fold_norms, repeats=repeats, progress=progress,
            budget_s=budget_s, cache=cache, selection=selection, verify=verify,
        )  # fmt: skip
    elif kernels != "auto":
        passes.append(BindKernels(_plain(kernels)))
    return Pipeline(passes)


def planning_pipeline(
    args: tuple = (),
    kwargs: Mapping | None = None,
    *,
    layout: str = "auto",
    kernels: str | Mapping[str, str] = "auto",
    fold_norms: bool | None = None,
    repeats: int = 5,
    progress: bool | None = None,
    budget_s: float = 10.0,
    cache: bool = True,
    selection: Selection | str | os.PathLike | None = None,
    verify: bool | str = False,
) -> Pipeline:
    """The passes that :func:`plan` runs on a converted graph; arguments as there, norms folded as before."""
    if selection is not None and (layout != "auto" or kernels != "auto"):
        raise ValueError("selection= says layouts and kernels: leave layout= and kernels= at 'auto'")
    choices = None if selection is None else choices_of(selection)
    measuring = {"repeats": repeats, "progress": progress, "cache": cache}
    budget_s = check_budget(budget_s)
    share = 1.0 if layout == "time_first" else 0.6  # of the budget, for neurons: time-first no other layer has a choice
    passes = [
        UnfoldNorms(),
        PropagateShapes(args, kwargs),
        Autoselect(layout, _plain(kernels), choices=choices, budget_s=share * budget_s, **measuring),
        PlanLayout(layout, _plain(kernels), budget_s=(1 - share) * budget_s, **measuring),
        InsertConversions(),
        CancelConversions(),
        BindKernels(_plain(kernels)),
    ]
    if verify is not False:
        passes.append(VerifyPlan(args, kwargs, verify, _plain(kernels), repeats, progress))
    if fold_norms is not False:  # last: of a norm the planner knows both forms; folded, it takes its neuron's layout
        passes.append(FoldNorms(again=fold_norms is None))
    return Pipeline(passes, given=("neurons",))


def convert(
    model: nn.Module,
    *example_args,
    example_kwargs: Mapping | None = None,
    order: int = 2,
    dilation: str | int | Sequence[int] = "sawtooth",
    layout: str = "auto",
    kernels: str | Mapping[str, str] = "auto",
    init: str = "source",
    calibrate: Iterable | None = None,
    strict: bool = True,
    inplace: bool = False,
    accept: Sequence[str] = (),
    surrogate: Surrogate | None = None,
    gradient: str = "straight-through",
    channel_dims: Mapping[str, int | tuple[int, ...]] | None = None,
    fold_norms: bool = True,
    repeats: int = 5,
    progress: bool | None = None,
    budget_s: float = 10.0,
    cache: bool = True,
    selection: Selection | str | os.PathLike | None = None,
    verify: bool | str = False,
) -> fx.GraphModule:
    """Rewrite a spiking network: every neuron becomes a multiplication-free PSN on its fastest kernel.

    Args:
        model: multi-step, time first: neurons see (T, N, C, *). It may take (N, C, *) and repeat it inside. Of a
            compiled or DataParallel model, the network inside is converted: wrap the result again. Networks of
            snnTorch and Norse may step through time: what comes out does not (``docs/single_step.md``).
        example_args, example_kwargs: one real batch, whatever ``model(...)`` takes. With it, thresholds are set from
            the statistics that it gives, kernels are measured and layouts chosen. Without it, channels come from
            the graph, the kernels of highest rank run, and :func:`plan` can do the rest later.
        order: k, the taps of each neuron.
        dilation: ``"sawtooth"`` (1, 2, 3, 1, …), one integer, or a sequence.
        layout: ``"auto"``: the best for every stretch of the network, conversions included, as measured;
            ``"uniform"``: one for all, the better one; ``"time_first"``, ``"time_last"``: that one;
            ``"keep"``: as it is. See ``docs/layout.md``.
        kernels: ``"auto"`` (measured), one name, or a mapping from layer to name.
        init: ``"source"`` starts each neuron as its source without reset; ``"random"`` afresh.
        calibrate: batches on which the new neurons are fitted to what their sources do, resets included, layer by
            layer: a list or a DataLoader of what ``model`` takes. See ``docs/calibration.md``.
        strict: raise if a neuron cannot be converted; otherwise it stays, and the selection lists it.
        inplace: share the source's layers and put the new neurons into it, rather than work on a copy.
        accept: ``"batch_statistics"`` lets batch norms of a network that stepped through time see T·N samples.
        surrogate: for all new neurons; None keeps each source's.
        gradient: of the power-of-two quantiser: ``"straight-through"``, ``"round-only"`` or ``"none"``.
        channel_dims: where channels are not dim 2 of (T, N, C, *): for each such neuron, by its path in ``model``, the
            dim, or the dims that are channels together: ``{"attn_lif": (2, 3)}`` for (T, N, heads, width, L).
        fold_norms: with an example, let neurons apply the batch norms in front of them on load
            (:class:`mfpsn_fx.passes.FoldNorms`): the same network, with one tensor less for each.
        repeats: the fewest samples of a kernel that may be chosen.
        progress: show progress bars; None: if the terminal is one.
        budget_s: seconds to measure kernels for, all layers together.
        cache: use times measured earlier on this machine, and keep new ones (``docs/measurement.md``).
        selection: layouts and kernels from an earlier :func:`selection`, its JSON text or the path of it, instead of
            measuring; layers that it does not fit are named in a warning and measured.
        verify: measure a training step of the planned network and of the uniform ones, end to end: ``True``: eager and
            compiled; ``"eager"`` or ``"compiled"``: that alone. If the plan lost by more than the noise, the better
            one is used.

    Returns:
        A GraphModule that takes what ``model`` takes; make optimizers for *its* parameters.

    Raises:
        TypeError: ``model`` is no module, or the example does not fit.
        ValueError: there is no neuron in it, an option is unknown, weights are NaN, or the example is empty.
        ConversionError: with ``strict``, a neuron cannot be converted; all are named. Steps of a network that steps
            through time are not alike, or cannot run at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, found {type(model).__name__}")
    if layout not in RULES:
        Layout.parse(layout)  # it says which there are
    if isinstance(kernels, str) and kernels != "auto":
        get_kernel(kernels)
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, found {order!r}")
    kwargs = dict(example_kwargs or {})
    has_example = bool(example_args or kwargs)
    if layout == "time_last" and not has_example:
        raise ValueError("layout='time_last' needs an example input: which tensors have a T axis shows only there")
    if selection is not None and not has_example:
        raise ValueError("selection= needs an example input: layers are matched by its shapes")
    if verify is not False and not has_example:
        raise ValueError("verify needs an example input: what is measured runs on it")
    pipeline = functools.partial(
        conversion_pipeline, order=order, dilation=dilation, layout=layout, kernels=kernels, init=init,
        calibrate=calibrate, strict=strict, surrogate=surrogate, gradient=gradient, channel_dims=channel_dims,
        fold_norms=fold_norms, repeats=repeats, progress=progress, budget_s=budget_s, cache=cache,
        selection=selection, verify=verify,
    )  # fmt: skip
    check_accept(accept)
    pipeline(example_args, kwargs)  # options are looked at before anything is copied
    model = unwrapped(model)
    if is_stepping(model):  # a neuron that is the whole network
        model = nn.Sequential(OverTime(model))
    _check_model(model)
    _check_example(example_args, kwargs)
    subject = model if inplace else copied(model)
    with _restored_on_error(subject):
        stepped, switched, rolled = has_steps(model), Switched(), None
        if not stepped:
            switched = to_multi_step(subject, example_args, kwargs)
        if inplace and (stepped or switched.looped):
            raise ValueError(
                f"inplace=True cannot be: {type(model).__name__} steps through time, and its own forward cannot take "
                "neurons that see all of it; use the graph that convert returns"
            )
        if stepped:
            rolled = rolled_up(subject, example_args, kwargs, accept)
        elif switched.looped:
            try:
                rolled = rolled_loop(subject, example_args, kwargs, accept)
            except ConversionError as error:
                if strict:
                    raise
                switched = Switched(refusals=dict.fromkeys(switched.refusals, str(error)))
        if rolled is not None:
            gm, example_args, kwargs = rolled
            gm = pipeline(example_args, kwargs)(gm)
        else:
            gm, _ = capture(subject)
            gm.meta[REFUSED] = switched.refusals
            with _said_why(switched.refusals):
                gm = pipeline(example_args, kwargs)(gm)
            _add_notes(gm, switched.notes)
        if not any(isinstance(m, MulFreePSN) for m in gm.modules()):
            only = "; its membranes are read out, and none of its spikes" if rolled is not None else ""
            why = "".join(f"\n  {path}: {reason}" for path, reason in switched.refusals.items())
            raise ConversionError(f"no neuron of {type(model).__name__} could be converted{only}{why}")
        if inplace:
            _swap_into(subject, gm)
    gm.meta.clear()
    _forget_cached_states(model)
    return gm


def plan(
    model: nn.Module,
    *example_args,
    example_kwargs: Mapping | None = None,
    layout: str = "auto",
    kernels: str | Mapping[str, str] = "auto",
    repeats: int = 5,
    progress: bool | None = None,
    budget_s: float = 10.0,
    cache: bool = True,
    selection: Selection | str | os.PathLike | None = None,
    verify: bool | str = False,
) -> fx.GraphModule:
    """Measure and choose layout and kernels of a converted network for a batch like this one, in place.

    Can be repeated, on another machine or at another shape. Arguments as in :func:`convert`; weights and statistics
    stay as they are. Batch norms are folded again if they were, where norm and neuron have one layout.

    Raises:
        TypeError: ``model`` was not returned by ``convert``, or the example does not fit.
        ValueError: no example, an empty one, or an unknown or unsupported layout or kernel.
    """
    gm = graph_of(model)
    kwargs = dict(example_kwargs or {})
    if not (example_args or kwargs):
        raise ValueError("plan needs an example input: kernels are measured at its shapes")
    _check_example(example_args, kwargs)
    pipeline = planning_pipeline(
        example_args, kwargs, layout=layout, kernels=kernels, repeats=repeats, progress=progress, budget_s=budget_s,
        cache=cache, selection=selection, verify=verify,
    )  # fmt: skip
    try:
        gm = pipeline(gm)
    except BaseException:
        FoldNorms(again=True)(gm)
        gm.meta.clear()
        raise
    gm.meta.clear()
    return gm


def _plain(kernels: str | Mapping[str, str]) -> str | dict[str, str]:
    return kernels if isinstance(kernels, str) else dict(kernels)


def _check_model(model: nn.Module) -> None:
    if not source_paths(model) and not any(isinstance(m, MulFreePSN) for m in model.modules()):
        raise ValueError(
            f"no spiking neuron found in {type(model).__name__}; neurons of your own are made known with "
            "mfpsn_fx.register_source"
        )
    for name, tensor in model.named_parameters():
        if not isinstance(tensor, nn.parameter.UninitializedParameter) and bool(tensor.isnan().any()):
            raise ValueError(f"{name}: the weights contain NaN; train or reinitialise this layer before converting")


def _check_example(args: tuple, kwargs: Mapping) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            raise ValueError(
                f"the example is empty (shape {tuple(value.shape)}): statistics and times need at least one value"
            )


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put ``model``'s children and step modes back as they were if converting fails half way."""
    before = {module: dict(module._modules) for module in model.modules()}
    modes = [(module, module._step_mode) for module in model.modules() if "_step_mode" in vars(module)]
    try:
        yield
    except BaseException:
        for module, children in before.items():
            module._modules.clear()
            module._modules.update(children)
        for module, mode in modes:
            module._step_mode = mode
        raise


def _swap_into(model: nn.Module, gm: fx.GraphModule) -> None:
    for path, module in gm.named_modules(remove_duplicate=False):
        if not isinstance(module, MulFreePSN) or "@" in path:  # a further use: the source's own forward has but one
            continue
        parent, _, child = path.rpartition(".")
        with contextlib.suppress(AttributeError):  # under the root leaf's name it is there already
            setattr(model.get_submodule(parent), child, module)


@contextlib.contextmanager
def _said_why(refusals: Mapping[str, str]) -> Iterator[None]:
    """Give the reason of neurons in step mode 's' if the model does not run on the example with them."""
    try:
        yield
    except (ConversionError, TypeError):
        raise
    except Exception as error:
        if not refusals:
            raise
        raise ConversionError("\n".join(f"{path}: {reason}" for path, reason in refusals.items())) from error


def _add_notes(gm: fx.GraphModule, notes: Mapping[str, str]) -> None:
    """Notes on neurons by their paths in the user's model."""
    for path, module in gm.named_modules():
        note = said_of(gm, notes, path)
        if note is not None and isinstance(module, MulFreePSN):
            module.source = dataclasses.replace(module.source, notes=(*module.source.notes, note))


def _forget_cached_states(model: nn.Module) -> None:
    """SpikingJelly's reset_net keeps a list of ``model``'s modules; where it is loaded it must make it anew."""
    functional = sys.modules.get("spikingjelly.activation_based.functional")
    invalidate = getattr(getattr(functional, "net_config", None), "invalidate_reset_cache", None)
    if callable(invalidate):
        invalidate(model)
