"""The Dynamo backend ``"mfpsn_fx"``: plan layouts, bind the fastest kernels, then call another compiler."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, fx, nn

from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.passes import LowerConversions, Neuron, Pass, PassContext, Pipeline, neurons

from .conversion import planning_pipeline

__all__ = ["Backend", "backend", "backend_pipeline", "count_recompiles_by_module"]

_log = logging.getLogger("mfpsn_fx")


def backend_pipeline(layout: str = "auto", repeats: int = 5, budget_s: float = 10.0) -> Pipeline:
    """Return the passes that the backend runs on Dynamo's graph: those of :func:`plan`, then ``LowerConversions``.

    The fake tensors in the graph serve as the example. Arguments as in :func:`plan`.
    """
    planning = planning_pipeline(layout=layout, repeats=repeats, budget_s=budget_s, progress=False)
    return planning.inserted(LowerConversions())


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend for ``torch.compile``: plan and bind the neurons of Dynamo's graph, then compile it.

    ``torch.compile(model, backend=mfpsn_fx.Backend(…))``; ``backend="mfpsn_fx"`` is ``Backend()``. It takes any network
    with :class:`MulFreePSN` modules, converted or not. Each graph is planned for the shapes, dtypes and devices of the
    call that it was compiled for: one graph for training (forward and backward together) and one for evaluation. The
    choices are logged at INFO level and are constants in the graph, so they are part of the cache keys of
    ``torch.compile``. Two backends with equal settings are equal, and share compiled graphs.

    Args:
        passes: passes to run on a graph with neurons, in place of :func:`backend_pipeline`. They run even if every
            neuron is bound already.
        inner: the compiler to call afterwards: ``"inductor"``, another name of ``torch.compiler.list_backends``, or a
            callable ``(graph module, example inputs) -> callable``.
        mode, options: as in ``torch.compile``, for the inner compiler.
        replan: choose kernels again for neurons that ``convert`` or ``plan`` bound; otherwise they keep kernel and
            layout.

    Raises:
        TypeError: ``passes`` is not iterable, or ``inner`` is neither a name nor a callable.
        ValueError: ``passes`` cannot run in this order, there is no backend called ``inner``, or Inductor is given both
            mode and options, or ones that it does not know.
    """

    passes: Pipeline | Iterable[Pass] | None = None
    inner: str | Callable = "inductor"
    mode: str | None = None
    options: Mapping[str, object] | None = None
    replan: bool = False

    def __post_init__(self) -> None:
        if self.passes is not None and not isinstance(self.passes, Pipeline):
            if not isinstance(self.passes, Iterable):
                raise TypeError(f"Backend: passes must be a Pipeline or passes in order, found {self.passes!r}")
            object.__setattr__(self, "passes", Pipeline(tuple(self.passes), given=("neurons",)))
        _check_inner(self.inner)
        if self.inner == "inductor":
            _inductor_options(self.mode, self.options)

    def __hash__(self) -> int:  # without options, a mapping that cannot be hashed
        return hash((self.passes, self.inner, self.mode, self.replan))

    @property
    def __name__(self) -> str:  # shown in messages of torch.compile
        return "mfpsn_fx"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Tensor],
        *,
        mode: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Callable:
        """Plan ``gm`` and compile it; ``mode`` and ``options`` of ``torch.compile`` replace the backend's own."""
        count_recompiles_by_module()
        gm = self._planned(gm)
        if mode is None and options is None:
            mode, options = self.mode, self.options
        return _compiled(self.inner, gm, example_inputs, mode, options)

    def _planned(self, gm: fx.GraphModule) -> fx.GraphModule:
        found = neurons(gm)
        bound = frozenset() if self.replan else frozenset(n.name for n in found if _kernel(n))
        if not found or (self.passes is None and len(bound) == len(found)):
            return gm
        if self.passes is not None:
            gm = self.passes(gm)
        else:
            gm = backend_pipeline("keep" if bound else "auto")(gm, PassContext(fixed=bound))
        for neuron in neurons(gm):
            _log.info("%s: %s in %s", neuron.name, _kernel(neuron), neuron.layout)
        return gm


def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor], **options) -> Callable:
    """Compile Dynamo's graph with the default :class:`Backend`; the entry point ``"mfpsn_fx"``.

    Args:
        gm: Dynamo's graph.
        example_inputs: its (fake) inputs.
        options: ``mode`` and ``options`` as ``torch.compile`` gives them.

    Returns:
        The compiled graph, a callable with the graph's inputs and outputs.
    """
    return Backend()(gm, example_inputs, **options)


def _kernel(neuron: Neuron) -> str:
    return neuron.kernel or neuron.eval_kernel


def _check_inner(inner: str | Callable) -> None:
    if isinstance(inner, str):
        import torch

        known = torch.compiler.list_backends(exclude_tags=())
        if inner == "mfpsn_fx" or inner not in known:
            names = ", ".join(sorted(set(known) - {"mfpsn_fx"}))
            raise ValueError(f"Backend: no inner compiler {inner!r}; there are {names}, or give a callable")
    elif not callable(inner):
        raise TypeError(f"Backend: inner must be a backend's name or a callable, found {type(inner).__name__}")


def _inductor_options(mode: str | None, options: Mapping[str, object] | None) -> dict[str, object]:
    """Return Inductor's settings for ``mode`` or ``options``; ``ValueError`` for unknown ones."""
    if mode in (None, "default") and not options:
        return {}
    from torch import _inductor

    if mode not in (None, "default"):
        if options:
            raise ValueError("Backend: give Inductor mode or options, not both")
        try:
            return _inductor.list_mode_options(mode)
        except RuntimeError as error:
            raise ValueError(f"Backend: {error}") from None
    chosen = {name.replace("-", "_"): value for name, value in options.items()}
    if unknown := sorted(set(chosen) - set(_inductor.config.get_config_copy())):
        raise ValueError(f"Backend: Inductor has no options {unknown}; torch._inductor.list_options() names them all")
    return chosen


def _default_options(gm: fx.GraphModule) -> dict[str, object]:
    """Return the Inductor settings that suit ``gm`` better than Inductor's defaults.

    On CPUs Inductor makes all convolutions channels-last, which converts weights, their gradients and spikes in every
    step: a training step of SEW-ResNet-18 took 1.2 to 1.6 times as long as in eager mode with that, and 0.9 to 1.03
    times as long without it (docs/guide/compile.md).
    """
    on_cpu = all(neuron.meta is not None and neuron.meta[2].type == "cpu" for neuron in neurons(gm))
    return {"layout_optimization": False} if on_cpu and neurons(gm) else {}


def _compiled(
    inner: str | Callable,
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    mode: str | None,
    options: Mapping[str, object] | None,
) -> Callable:
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, example_inputs, config_patches=_default_options(gm) | _inductor_options(mode, options))
    if isinstance(inner, str):
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(inner)
    given = {"mode": None if mode == "default" else mode, "options": options or None}
    return inner(gm, example_inputs, **{name: value for name, value in given.items() if value is not None})


def count_recompiles_by_module() -> tuple[str, ...]:
    """Guard the graph that Dynamo is compiling by the identity of the modules that hold its frame's neurons.

    To be called within a Dynamo backend. After a graph break each layer is a frame of its own, and all layers of a
    class share one code object, for which Dynamo keeps at most ``torch._dynamo.config.recompile_limit`` graphs (8).
    Neurons differ in their names, dilations and kernels, so the ninth would run in eager mode from then on, with only a
    warning. Dynamo counts graphs that a guard ties to a module's identity separately for each module, so each layer has
    the limit to itself. The first half of the limit stays unguarded, so that layers with equal constants share graphs.

    Returns:
        The names of the frame's variables whose modules the graph was tied to.
    """
    try:  # there are no public names for guards
        from torch._dynamo import config
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list
        from torch._dynamo.guards import GuardBuilder, install_guard
        from torch._dynamo.source import LocalSource
        from torch._dynamo.symbolic_convert import InstructionTranslator, tls
    except ImportError as error:
        _log.warning("after graph breaks neurons share one recompile limit: this torch has other internals (%s)", error)
        return ()
    if getattr(tls, "current_tx", None) is None:  # called directly, outside of Dynamo
        return ()
    frame = InstructionTranslator.current_tx()
    if len(_debug_get_cache_entry_list(frame.f_code)) < config.recompile_limit // 2:
        return ()
    tied = tuple(name for name, value in frame.output.local_scope.items() if _holds_neurons(value))
    for name in tied:
        # is_input as Dynamo sets it: a source that differs from Dynamo's own would add a second guard
        source = LocalSource(name, is_input=name in frame.f_code.co_varnames[: frame.f_code.co_argcount])
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
    if tied:
        _log.debug("%s: one more graph, tied to %s", frame.f_code.co_name, ", ".join(tied))
    return tied


def _holds_neurons(value: object) -> bool:
    return isinstance(value, nn.Module) and any(isinstance(module, MulFreePSN) for module in value.modules())
