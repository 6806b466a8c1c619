"""The entry points ``convert`` and ``plan``, and their pipelines."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx, nn

from mfpsn_fx.model.capturing.capture import capture, copied, value_for_path
from mfpsn_fx.model.capturing.over_time import OverTime
from mfpsn_fx.model.capturing.step_mode import Switched, to_multi_step
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import source_paths
from mfpsn_fx.model.sources.stepping import is_stepping
from mfpsn_fx.passes import (
    ApplyPlan,
    AssignDilations,
    Autoselect,
    BindKernels,
    Calibrate,
    Canonicalize,
    CheckSources,
    ConversionError,
    ConvertOptions,
    Example,
    InitializeNeurons,
    MeasureOptions,
    ObserveInputs,
    PassContext,
    Pipeline,
    PlanLayout,
    PropagateShapes,
    ReplaceNeurons,
    SeparateUses,
    VerifyPlan,
)
from mfpsn_fx.passes.planning.replay import choices_of
from mfpsn_fx.passes.rollup.roll_up import check_accept

from .selection import graph_of, unwrapped
from .stepped_networks import has_steps, rolled_loop, rolled_up

__all__ = ["conversion_pipeline", "convert", "plan", "planning_pipeline"]


def conversion_pipeline(options: ConvertOptions | None = None, *, planned: bool = True, **overrides) -> Pipeline:
    """Return the passes that :func:`convert` runs on a captured graph; the context supplies the example.

    Args:
        options: used where the context has none; None: the defaults.
        planned: True to measure and choose layouts and kernels, which needs an example; False to bind the kernels that
            the options name.
        overrides: options by name, which take precedence over ``options``.

    Raises:
        TypeError, ValueError: there is no such option, or it does not take the value.
    """
    passes = [
        CheckSources(),
        ObserveInputs(),
        SeparateUses(),
        ReplaceNeurons(),
        AssignDilations(),
        InitializeNeurons(),
        Calibrate(),
        *(planning_pipeline() if planned else [BindKernels()]),
    ]
    return Pipeline(passes, options=_options(ConvertOptions, options, overrides))


def planning_pipeline(options: MeasureOptions | None = None, **overrides) -> Pipeline:
    """Return the passes that :func:`plan` runs on a converted graph; the context supplies the example.

    Args:
        options: used where the context has none; None: the defaults.
        overrides: options by name, which take precedence over ``options``.

    Raises:
        TypeError, ValueError: there is no such option, or it does not take the value.
    """
    passes = [Canonicalize(), PropagateShapes(), Autoselect(), PlanLayout(), VerifyPlan(), ApplyPlan()]
    return Pipeline(passes, given=("neurons",), options=_options(MeasureOptions, options, overrides))


def _documents(options: type[MeasureOptions]):
    """Return a decorator that puts the fields of ``options`` into a function's signature and docstring."""

    def decorate(function):
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = dataclasses.fields(options)
        keywords = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])
        described = "\n".join(f"        {f.name}: {f.metadata['doc']}" for f in fields)
        function.__doc__ = function.__doc__.replace("        overrides: options by name.", described)
        return function

    return decorate


@_documents(ConvertOptions)
def convert(
    model: nn.Module,
    *example_args,
    example_kwargs: Mapping | None = None,
    inplace: bool = False,
    accept: Sequence[str] = (),
    options: ConvertOptions | None = None,
    **overrides,
) -> fx.GraphModule:
    """Rewrite a spiking network: every neuron becomes a multiplication-free PSN on its fastest kernel.

    Args:
        model: multi-step and time-first: its neurons see (T, N, C, *). It may take (N, C, *) and repeat it inside. A
            compiled or DataParallel model is unwrapped: wrap the result again. Single-step networks of snnTorch and
            Norse, and loops over time, become multi-step ones (``docs/guide/stepped_networks.md``).
        example_args, example_kwargs: one real batch, the arguments of ``model(...)``. With it, thresholds are set from
            its statistics, kernels are measured and layouts chosen. Without it, channels come from the graph, the
            kernels of highest rank run, and :func:`plan` can measure and choose later.
        inplace: share the source's layers and put the new neurons into it, rather than work on a copy.
        accept: ``"batch_statistics"`` lets batch norms of a network that stepped through time see T·N samples.
        options: the options below as one value; options given by name take precedence over it.
        overrides: options by name.

    Returns:
        A GraphModule with the inputs of ``model``; make optimizers for *its* parameters.

    Raises:
        TypeError: ``model`` is not a module, there is no such option, or the example does not fit.
        ValueError: there is no neuron in it, an option does not take a value, weights are NaN, or the example is
            empty.
        ConversionError: with ``strict``, neurons cannot be converted; all are named. Or the steps of a network that
            steps through time differ, or cannot run at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, found {type(model).__name__}")
    options = _options(ConvertOptions, options, overrides)
    example = _example(example_args, example_kwargs)
    if not example:
        _check_without_example(options)
    if options.selection is not None:  # checked before anything is copied
        choices_of(options.selection)
    check_accept(accept)
    pipeline = conversion_pipeline(options, planned=bool(example))
    model = unwrapped(model)
    if is_stepping(model):  # a neuron that is the whole network
        model = nn.Sequential(OverTime(model))
    _check_model(model)
    subject = model if inplace else copied(model)
    with _restored_on_error(subject):
        stepped, switched, rolled = has_steps(model), Switched(), None
        if not stepped:
            switched = to_multi_step(subject, example.args, example.kwargs)
        if inplace and (stepped or switched.looped):
            raise ValueError(
                f"inplace=True is not possible: {type(model).__name__} steps through time, and its forward cannot call "
                "multi-step neurons; use the graph that convert returns"
            )
        if stepped:
            rolled = rolled_up(subject, example.args, example.kwargs, accept)
        elif switched.looped:
            try:
                rolled = rolled_loop(subject, example.args, example.kwargs, accept)
            except ConversionError as error:
                if options.strict:
                    raise
                switched = Switched(refusals=dict.fromkeys(switched.refusals, str(error)))
        if rolled is not None:
            gm, *given = rolled
            context = PassContext(Example(*given))
            gm = pipeline(gm, context)
        else:
            gm, _ = capture(subject)
            context = PassContext(example, refusals=dict(switched.refusals))
            with _refusals_in_errors(switched.refusals):
                gm = pipeline(gm, context)
            _add_notes(gm, switched.notes)
        if not any(isinstance(m, MulFreePSN) for m in gm.modules()):
            only = "; its membranes are read out, and none of its spikes" if rolled is not None else ""
            why = "".join(f"\n  {path}: {reason}" for path, reason in context.refusals.items())
            raise ConversionError(f"no neuron of {type(model).__name__} could be converted{only}{why}")
        if inplace:
            _swap_into(subject, gm)
    _forget_cached_states(model)
    return gm


@_documents(MeasureOptions)
def plan(
    model: nn.Module,
    *example_args,
    example_kwargs: Mapping | None = None,
    options: MeasureOptions | None = None,
    **overrides,
) -> fx.GraphModule:
    """Measure, and choose layouts and kernels of a converted network for this example's shape, in place.

    Can be repeated, on another machine or at another shape. Weights and statistics are unchanged. Batch norms that were
    fused into neurons are fused again where norm and neuron have one layout.

    Args:
        model: a network that :func:`convert` returned.
        example_args, example_kwargs: one real batch.
        options: the options below as one value; options given by name take precedence over it.
        overrides: options by name.

    Returns:
        The converted GraphModule inside ``model``, which was changed.

    Raises:
        TypeError: ``model`` was not returned by ``convert``, there is no such option, or the example does not fit.
        ValueError: no example, an empty one, or an unknown or unsupported layout or kernel.
    """
    gm = graph_of(model)
    options = _options(MeasureOptions, options, overrides)
    example = _example(example_args, example_kwargs)
    if not example:
        raise ValueError("plan needs an example input: kernels are measured at its shapes")
    before = copy.deepcopy(gm.graph)
    try:
        return planning_pipeline(options)(gm, PassContext(example))
    except BaseException:
        gm.graph = before
        raise


def _options(kind: type[MeasureOptions], given: MeasureOptions | None, overrides: Mapping[str, object]):
    """Return options of class ``kind``: those given, replaced by those given by name."""
    if given is not None and not isinstance(given, MeasureOptions):
        raise TypeError(f"options takes {kind.__name__}, found {type(given).__name__}")
    if given is None:
        given = kind()
    elif not isinstance(given, kind):  # ConvertOptions extend MeasureOptions
        given = kind(**vars(given))
    return given.replace(**overrides)


def _example(args: tuple, kwargs: Mapping | None) -> Example:
    """Return the example; raise for an empty tensor, or for options that are given by position."""
    example = Example(args, dict(kwargs or {}))
    for value in (*args, *example.kwargs.values()):
        if isinstance(value, MeasureOptions):
            raise TypeError(f"give {type(value).__name__} by keyword: options=…; positional arguments are the example")
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            raise ValueError(
                f"the example is empty (shape {tuple(value.shape)}): statistics and times need at least one value"
            )
    return example


def _check_without_example(options: ConvertOptions) -> None:
    if options.layout == "time_last":
        raise ValueError("layout='time_last' needs an example input: only its run shows which tensors have a T axis")
    if options.selection is not None:
        raise ValueError("selection= needs an example input: layers are matched by the shapes of their inputs")
    if options.verify is not False:
        raise ValueError("verify needs an example input to measure training steps on")


def _check_model(model: nn.Module) -> None:
    if not source_paths(model) and not any(isinstance(m, MulFreePSN) for m in model.modules()):
        raise ValueError(
            f"no spiking neuron found in {type(model).__name__}; register neurons of your own with "
            "mfpsn_fx.register_source"
        )
    for name, tensor in model.named_parameters():
        if not isinstance(tensor, nn.parameter.UninitializedParameter) and _has_nan(tensor):
            raise ValueError(f"{name}: the weights contain NaN; train or reinitialize this layer before converting")


def _has_nan(tensor: torch.Tensor) -> bool:
    """Return True if a value is NaN; unlike ``isnan().any()`` this takes no memory, and the minimum of NaN is NaN."""
    tensor = tensor.detach()
    if tensor.numel() == 0 or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    try:
        return bool(tensor.amin().isnan())
    except RuntimeError:  # torch has no minimum of eight-bit floating point and of sparse tensors
        dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
        return bool(dense.float().isnan().any())


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restore ``model``'s children and step modes if the block raises."""
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
    """Put the new neurons of ``gm`` into ``model`` at the same paths."""
    for path, module in gm.named_modules(remove_duplicate=False):
        if not isinstance(module, MulFreePSN) or "@" in path:  # a second use, which the source's forward cannot call
            continue
        with contextlib.suppress(AttributeError):  # inside a root leaf they are in place already
            model.set_submodule(path, module)


@contextlib.contextmanager
def _refusals_in_errors(refusals: Mapping[str, str]) -> Iterator[None]:
    """Raise the refusals of neurons in step mode 's' in place of the error that the example's run with them gives."""
    try:
        yield
    except (ConversionError, TypeError):
        raise
    except Exception as error:
        if not refusals:
            raise
        raise ConversionError("\n".join(f"{path}: {reason}" for path, reason in refusals.items())) from error


def _add_notes(gm: fx.GraphModule, notes: Mapping[str, str]) -> None:
    """Add notes to neurons, by their paths in the user's model."""
    for path, module in gm.named_modules():
        note = value_for_path(gm, notes, path)
        if note is not None and isinstance(module, MulFreePSN):
            module.source = dataclasses.replace(module.source, notes=(*module.source.notes, note))


def _forget_cached_states(model: nn.Module) -> None:
    """Invalidate the list of ``model``'s modules that SpikingJelly's ``reset_net`` caches, if it is loaded."""
    functional = sys.modules.get("spikingjelly.activation_based.functional")
    invalidate = getattr(getattr(functional, "net_config", None), "invalidate_reset_cache", None)
    if callable(invalidate):
        invalidate(model)
