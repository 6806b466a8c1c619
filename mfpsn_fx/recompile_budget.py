"""Dynamo's recompile limit, counted per module where many layers share one code object."""

from __future__ import annotations

import logging

from torch import nn

from mfpsn_fx.model.neuron import MulFreePSN

__all__ = ["count_recompiles_by_module"]

_log = logging.getLogger("mfpsn_fx")


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
