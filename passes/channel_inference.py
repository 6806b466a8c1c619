"""Infer a neuron's channels from the layers around it, and check that its input has them in dim 2."""

from __future__ import annotations

from torch import fx, nn

from mfpsn_fx.model.capturing.capture import user_path
from mfpsn_fx.model.neuron import MulFreePSN

__all__ = ["channels_before", "heads_note"]


def output_width(module: nn.Module) -> int | None:
    """Return the output channels of ``module``, or None if it has no attribute for them."""
    if isinstance(module, nn.Sequential) or type(module).__name__.endswith("Container"):
        widths = [w for child in module.children() if (w := output_width(child)) is not None]
        return widths[-1] if widths else None
    for attribute in ("out_channels", "out_features", "num_features"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    return None


def channels_before(gm: fx.GraphModule, path: str) -> int | None:
    """Return the output channels of the last layer before the neuron at ``path``, or None if they are not known."""
    node = next((n for n in gm.graph.nodes if n.op == "call_module" and n.target == path), None)
    if node is None:  # inside a leaf: the last such layer that is registered before the neuron
        last = None
        for name, module in gm.named_modules():
            if name == path:
                return last
            last = output_width(module) if output_width(module) is not None and not list(module.children()) else last
        return None
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op != "call_module":
            if node.op == "call_method" or "flatten" in str(node.target):
                return None
            continue
        module = gm.get_submodule(node.target)
        if (width := output_width(module)) is not None:
            return width
        if isinstance(module, MulFreePSN):
            return module.channels
        if "Flatten" in type(module).__name__:
            return None
    return None


def _input_width(module: nn.Module) -> int | None:
    """Return the input channels of ``module``, or None if it has no attribute for them."""
    for attribute in ("in_channels", "in_features", "num_features"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    return None


def _widths_around(gm: fx.GraphModule, path: str) -> list[int]:
    """Return the input and output channels of the layers around the neuron at ``path``, the nearest first if known."""
    node = next((n for n in gm.graph.nodes if n.op == "call_module" and n.target == path), None)
    if node is not None:
        found = [_channels_after(gm, node), channels_before(gm, path)]
    else:  # inside a leaf, whose order of calls is not known: all layers of its innermost module that has any
        found, parent = [], path
        while not found and parent:
            parent = parent.rpartition(".")[0]
            layers = [m for m in gm.get_submodule(parent).modules() if not list(m.children())]
            found = [width for m in layers for width in (_input_width(m), output_width(m)) if width is not None]
    return list(dict.fromkeys(width for width in found if width is not None))


def _channels_after(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Return the input channels of the first layer after ``node``, or None if they are not known."""
    while node.users:
        node = next(iter(node.users))
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            if "Flatten" in type(module).__name__:
                return None
            if (width := _input_width(module)) is not None:
                return width
        elif node.op == "call_method" or "flatten" in str(node.target):
            return None
    return None


def heads_note(gm: fx.GraphModule, path: str, shape: tuple[int, ...]) -> str | None:
    """Return a note if the size of dim 2 of a neuron's input ``shape`` is not the channels of the layers around it.

    So it is after attention, (T, N, heads, width, L), where the neuron has one filter for each head. If one dim, or two
    together, have as many entries as a layer around has channels, the note names them for ``channel_dims``.
    """
    widths = _widths_around(gm, path)
    if not widths or shape[2] in widths or len(shape) < 4:
        return None
    inner = [d for d in range(3, len(shape)) if shape[d] > 1]
    found = f"dim 2 of its input {shape} is not the channels of the layers around it ({', '.join(map(str, widths))})"
    together = [(2, d) for d in inner if shape[2] * shape[d] in widths]
    fitting = together or [d for d in inner if shape[d] in widths]
    if not fitting:
        return f"{found}: one filter for each of its {shape[2]} entries (heads?)"
    dims = f"dims {fitting[0]} together" if together else f"dim {fitting[0]}"
    return (
        f"{found}: one filter for each of its {shape[2]} entries; if channels are {dims}, give "
        f"channel_dims={{{user_path(gm, path)!r}: {fitting[0]}}}"
    )
