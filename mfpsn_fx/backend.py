"""``torch.compile(model, backend="mfpsn_fx")``: plan layouts, bind the fastest kernels, hand over to a compiler."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, fx

from mfpsn_fx.passes import LowerConversions, Neuron, Pass, PassContext, Pipeline, neurons

from .conversion import planning_pipeline
from .recompile_budget import count_recompiles_by_module

__all__ = ["Backend", "backend", "backend_pipeline"]

_log = logging.getLogger("mfpsn_fx")


def backend_pipeline(layout: str = "auto", repeats: int = 5, budget_s: float = 10.0) -> Pipeline:
    """Return the passes that the backend runs on Dynamo's graph: those of :func:`plan`, and conversions are lowered.

    The fake tensors in the graph stand for an example. Arguments as in :func:`plan`.
    """
    planning = planning_pipeline(layout=layout, repeats=repeats, budget_s=budget_s, progress=False)
    return planning.inserted(LowerConversions())


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend for ``torch.compile``: plan and bind the neurons of Dynamo's graph, then compile it.

    ``torch.compile(model, backend=mfpsn_fx.Backend(…))``; ``backend="mfpsn_fx"`` is ``Backend()``. Any network with
    :class:`MulFreePSN` modules will do, converted or not. Each graph is planned for the shapes, dtypes and devices of
    the call that it was compiled for: one for training and one for evaluation, one for forward and backward together.
    What was chosen is logged at INFO level, and stands in the graph as constants, so the caches of ``torch.compile``
    tell graphs with other choices apart. Two backends with equal settings are equal, and share compiled graphs.

    Args:
        passes: what to run on a graph with neurons, in place of :func:`backend_pipeline`; always run.
        inner: the compiler behind: ``"inductor"``, another name of ``torch.compiler.list_backends``, or a callable
            ``(graph module, example inputs) -> callable``.
        mode, options: as in ``torch.compile``, for the inner compiler.
        replan: choose anew for neurons that ``convert`` or ``plan`` bound; otherwise they keep kernel and layout.

    Raises:
        TypeError: ``passes`` or ``inner`` is nothing that can be called.
        ValueError: ``passes`` cannot run in this order, there is no backend called ``inner``, or mode and options are
            both given to Inductor, or unknown to it.
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

    def __hash__(self) -> int:  # options are a mapping
        return hash((self.passes, self.inner, self.mode, self.replan))

    @property
    def __name__(self) -> str:  # what torch.compile calls it in messages
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
    """The Dynamo backend behind the entry point ``"mfpsn_fx"``: :class:`Backend` as it is without arguments.

    Args:
        gm: Dynamo's graph.
        example_inputs: its (fake) inputs.
        options: ``mode`` and ``options`` as ``torch.compile`` gives them.
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
    """Inductor's settings under ``mode`` or ``options``; ``ValueError`` for what it does not know."""
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
    """What is better for networks with neurons than Inductor's own settings.

    On CPUs it lays all convolutions out channels last, which converts weights, their gradients and spikes in every
    step: one of SEW-ResNet-18 then took 1.2 to 1.6 times as long as in eager mode, and without 0.9 to 1.03 times as
    long (docs/guide/compile.md).
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
