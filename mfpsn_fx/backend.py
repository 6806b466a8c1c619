"""``torch.compile(model, backend="mfpsn_fx")``: bind the fastest kernels, then hand over to Inductor."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor, fx

from mfpsn_fx.passes import Autoselect, BindKernels, Pipeline, PropagateShapes, neurons

__all__ = ["backend", "backend_pipeline"]

_log = logging.getLogger("mfpsn_fx")


def backend_pipeline(repeats: int = 5) -> Pipeline:
    """The passes that the backend runs on Dynamo's graph; the layout of each neuron stays as it is."""
    return Pipeline([PropagateShapes(), Autoselect("keep", "auto", repeats, progress=False), BindKernels()],
                    given=("neurons",))  # fmt: skip


def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor], **options):
    """A Dynamo backend: measure and bind the neurons of ``gm``, then compile it with Inductor.

    Any network with :class:`MulFreePSN` modules will do, converted or not; neurons that ``convert`` or ``plan`` bound
    keep their kernels. Registered as the entry point ``"mfpsn_fx"``. What was chosen is logged at INFO level.

    Args:
        gm: Dynamo's graph.
        example_inputs: its (fake) inputs.
        options: passed to Inductor as ``torch.compile(options=…)`` gives them.
    """
    from torch._inductor.compile_fx import compile_fx

    unbound = [neuron for neuron in neurons(gm) if not (neuron.kernel or neuron.eval_kernel)]
    if unbound:
        given = dict(gm.meta)
        gm = backend_pipeline()(gm)
        gm.meta = given  # what was measured is in the nodes now, and no business of the compiler's caches
        for neuron in neurons(gm):
            _log.info("%s: %s in %s", neuron.name, neuron.kernel or neuron.eval_kernel, neuron.layout)
    return compile_fx(gm, example_inputs, config_patches=options.get("options") or None)
