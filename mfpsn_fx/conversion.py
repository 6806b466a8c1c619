"""``convert`` and ``plan``, and the pipelines that they run."""

from __future__ import annotations

import contextlib
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
from mfpsn_fx.passes.fuse_norms import fuse_norms
from mfpsn_fx.passes.planning.replay import choices_of
from mfpsn_fx.passes.rollup.roll_up import check_accept

from .selection import graph_of, unwrapped
from .stepped_networks import has_steps, rolled_loop, rolled_up

__all__ = ["conversion_pipeline", "convert", "plan", "planning_pipeline"]


def conversion_pipeline(options: ConvertOptions | None = None, *, planned: bool = True, **overrides) -> Pipeline:
    """Return the passes that :func:`convert` runs on a captured graph; the example comes with the context.

    Args:
        options: those of a context that has none; None: the defaults.
        planned: measure, and choose layouts and kernels, which needs an example; otherwise bind the kernels that the
            options name.
        overrides: options by name, in place of those in ``options``.

    Raises:
        TypeError, ValueError: there is no such option, or its value is none that it takes.
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
    """Return the passes that :func:`plan` runs on a converted graph; the example comes with the context.

    Args:
        options: those of a context that has none; None: the defaults.
        overrides: options by name, in place of those in ``options``.

    Raises:
        TypeError, ValueError: there is no such option, or its value is none that it takes.
    """
    passes = [Canonicalize(), PropagateShapes(), Autoselect(), PlanLayout(), VerifyPlan(), ApplyPlan()]
    return Pipeline(passes, given=("neurons",), options=_options(MeasureOptions, options, overrides))


def _takes(options: type[MeasureOptions]):
    """Decorator: show the options in the function's signature and docstring, as they stand in ``options``."""

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


@_takes(ConvertOptions)
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
        model: multi-step, time first: neurons see (T, N, C, *). It may take (N, C, *) and repeat it inside. Of a
            compiled or DataParallel model, the network inside is converted: wrap the result again. Networks of
            snnTorch and Norse may step through time: what comes out does not (``docs/guide/stepped_networks.md``).
        example_args, example_kwargs: one real batch, whatever ``model(...)`` takes. With it, thresholds are set from
            the statistics that it gives, kernels are measured and layouts chosen. Without it, channels come from
            the graph, the kernels of highest rank run, and :func:`plan` can do the rest later.
        inplace: share the source's layers and put the new neurons into it, rather than work on a copy.
        accept: ``"batch_statistics"`` lets batch norms of a network that stepped through time see T·N samples.
        options: the options below in one value; those that are given by name come before it.
        overrides: options by name.

    Returns:
        A GraphModule that takes what ``model`` takes; make optimizers for *its* parameters.

    Raises:
        TypeError: ``model`` is no module, there is no such option, or the example does not fit.
        ValueError: there is no neuron in it, an option has a value that it does not take, weights are NaN, or the
            example is empty.
        ConversionError: with ``strict``, a neuron cannot be converted; all are named. Steps of a network that steps
            through time are not alike, or cannot run at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, found {type(model).__name__}")
    options = _options(ConvertOptions, options, overrides)
    example = _example(example_args, example_kwargs)
    if not example:
        _check_without_example(options)
    if options.selection is not None:  # looked at before anything is copied
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
                f"inplace=True cannot be: {type(model).__name__} steps through time, and its own forward cannot take "
                "neurons that see all of it; use the graph that convert returns"
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
            with _said_why(switched.refusals):
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


@_takes(MeasureOptions)
def plan(
    model: nn.Module,
    *example_args,
    example_kwargs: Mapping | None = None,
    options: MeasureOptions | None = None,
    **overrides,
) -> fx.GraphModule:
    """Measure and choose layout and kernels of a converted network for a batch like this one, in place.

    Can be repeated, on another machine or at another shape. Weights and statistics stay as they are. Batch norms are
    fused again if they were, where norm and neuron have one layout.

    Args:
        model: what :func:`convert` returned.
        example_args, example_kwargs: one real batch.
        options: the options below in one value; those that are given by name come before it.
        overrides: options by name.

    Raises:
        TypeError: ``model`` was not returned by ``convert``, there is no such option, or the example does not fit.
        ValueError: no example, an empty one, or an unknown or unsupported layout or kernel.
    """
    gm = graph_of(model)
    options = _options(MeasureOptions, options, overrides)
    example = _example(example_args, example_kwargs)
    if not example:
        raise ValueError("plan needs an example input: kernels are measured at its shapes")
    context = PassContext(example)
    try:
        return planning_pipeline(options)(gm, context)
    except BaseException:
        if context.norms_unfused:
            fuse_norms(gm)
        raise


def _options(kind: type[MeasureOptions], given: MeasureOptions | None, overrides: Mapping[str, object]):
    """Options of ``kind``: those given, and over them those by name."""
    if given is not None and not isinstance(given, MeasureOptions):
        raise TypeError(f"options takes {kind.__name__}, found {type(given).__name__}")
    if given is None:
        given = kind()
    elif not isinstance(given, kind):  # what measuring needs is part of what converting needs
        given = kind(**vars(given))
    elif type(given) is not kind:
        given = kind(**{field.name: getattr(given, field.name) for field in dataclasses.fields(kind)})
    return given.replace(**overrides)


def _example(args: tuple, kwargs: Mapping | None) -> Example:
    """The example, or an error if there is nothing in one of its tensors, or options stand in its place."""
    example = Example(args, dict(kwargs or {}))
    for value in (*args, *example.kwargs.values()):
        if isinstance(value, MeasureOptions):
            raise TypeError(f"give {type(value).__name__} by keyword: options=…; what is not named is the example")
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            raise ValueError(
                f"the example is empty (shape {tuple(value.shape)}): statistics and times need at least one value"
            )
    return example


def _check_without_example(options: ConvertOptions) -> None:
    if options.layout == "time_last":
        raise ValueError("layout='time_last' needs an example input: which tensors have a T axis shows only there")
    if options.selection is not None:
        raise ValueError("selection= needs an example input: layers are matched by its shapes")
    if options.verify is not False:
        raise ValueError("verify needs an example input: what is measured runs on it")


def _check_model(model: nn.Module) -> None:
    if not source_paths(model) and not any(isinstance(m, MulFreePSN) for m in model.modules()):
        raise ValueError(
            f"no spiking neuron found in {type(model).__name__}; neurons of your own are made known with "
            "mfpsn_fx.register_source"
        )
    for name, tensor in model.named_parameters():
        if not isinstance(tensor, nn.parameter.UninitializedParameter) and _has_nan(tensor):
            raise ValueError(f"{name}: the weights contain NaN; train or reinitialize this layer before converting")


def _has_nan(tensor: torch.Tensor) -> bool:
    """Return True if a value is NaN; unlike ``isnan().any()`` this takes no memory, and the minimum of NaN is NaN."""
    return tensor.numel() > 0 and tensor.is_floating_point() and bool(tensor.detach().amin().isnan())


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
        with contextlib.suppress(AttributeError):  # under the root leaf's name it is there already
            model.set_submodule(path, module)


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
        note = value_for_path(gm, notes, path)
        if note is not None and isinstance(module, MulFreePSN):
            module.source = dataclasses.replace(module.source, notes=(*module.source.notes, note))


def _forget_cached_states(model: nn.Module) -> None:
    """SpikingJelly's reset_net keeps a list of ``model``'s modules; where it is loaded it must make it anew."""
    functional = sys.modules.get("spikingjelly.activation_based.functional")
    invalidate = getattr(getattr(functional, "net_config", None), "invalidate_reset_cache", None)
    if callable(invalidate):
        invalidate(model)
