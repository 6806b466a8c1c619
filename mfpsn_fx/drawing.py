"""Pictures of a converted network's graph: layouts, conversions, kernels and their times."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import torch
from torch import fx, nn

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.model.norms.affine import norm_affine
from mfpsn_fx.model.results import record_of
from mfpsn_fx.model.time_last import run_time_last
from mfpsn_fx.passes import conversion_nodes, neurons
from mfpsn_fx.passes.layout.regions import time_last_nodes
from mfpsn_fx.passes.neurons import input_meta
from mfpsn_fx.passes.op_traits import shape_arithmetic

from .selection import Row, graph_of, selection

__all__ = ["draw", "to_dot"]

_COLORS = {Layout.TIME_FIRST: "#d6e6f5", Layout.TIME_LAST: "#fbdcb8"}
_CONVERSION = "#c0392b"
_NEURON = 'shape=box, style="filled,bold"'
_OTHER = 'shape=box, style="filled,rounded"'
_TEXT = (".dot", ".gv")
_TAKE_MODULES = (norm_affine, run_time_last)
_RENDERED = (".svg", ".png", ".pdf")


def draw(model: nn.Module, path: str | os.PathLike) -> None:
    """Draw the graph of a converted network into a file.

    Neurons have a bold frame, and show their kernels and the milliseconds of forward and backward, where they were
    measured. Colors are layouts. A red edge is a layout conversion, with the bytes of the tensor that it copies; a
    dashed edge carries the scale and shift of a batch norm that is fused into a neuron. Nodes that only compute shapes
    are left out.

    Args:
        model: a network that ``convert`` returned, possibly compiled or wrapped.
        path: ends in ``.svg``, ``.png`` or ``.pdf``, which need Graphviz, or in ``.dot`` or ``.gv`` for the graph as
            Graphviz's text, which does not.

    Raises:
        TypeError: ``model`` is not a converted network.
        ValueError: the file's name has another suffix.
        RuntimeError: Graphviz is not installed, or failed.
    """
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind not in _TEXT + _RENDERED:
        raise ValueError(f"cannot draw into {path.name!r}: its name must end in {', '.join(_RENDERED + _TEXT)}")
    program = shutil.which("dot")
    if kind in _RENDERED and program is None:
        raise RuntimeError(
            f"drawing {kind[1:].upper()} needs Graphviz's program dot, which was not found: install the package "
            f"graphviz of your system (apt, brew, conda), or draw into {path.with_suffix('.dot').name!r}, which does "
            "not need it"
        )
    text = to_dot(model)
    if kind in _TEXT:
        path.write_text(text, encoding="utf-8")
        return
    done = subprocess.run([program, f"-T{kind[1:]}"], input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Graphviz could not draw {path.name!r}: {done.stderr.decode(errors='replace').strip()}")
    path.write_bytes(done.stdout)


def to_dot(model: nn.Module) -> str:
    """Return the graph that :func:`draw` draws, in Graphviz's DOT language.

    Raises:
        TypeError: ``model`` is not a converted network.
    """
    gm = graph_of(model)
    time_last = time_last_nodes(gm)
    rows = _rows(gm)
    hidden = _hidden(gm)
    converted = set(conversion_nodes(gm))
    edges = {node for node in converted if sum(user not in hidden for user in node.users) == 1}
    parts = {user: user.args[1] for node in gm.graph.nodes if node.target is norm_affine for user in node.users}
    lines = [
        "digraph {",
        "  rankdir=TB; node [fontname=Helvetica, fontsize=10]; edge [fontname=Helvetica, fontsize=9];",
    ]
    for node in gm.graph.nodes:
        if node in hidden or node in parts or node in edges:
            continue
        if node in converted:  # several readers of one copy: the edge branches here
            lines.append(f"  {_quoted(node.name)} [shape=point, color={_quoted(_CONVERSION)}];")
            continue
        color = _COLORS[Layout.TIME_LAST if node in time_last else Layout.TIME_FIRST]
        style = _NEURON if node in rows and node.op == "call_module" else _OTHER
        text = "\n".join(_label(gm, node, rows.get(node, [])))
        lines.append(f"  {_quoted(node.name)} [{style}, fillcolor={_quoted(color)}, label={_quoted(text)}];")
    for node in gm.graph.nodes:
        if node in hidden or node in parts or node in edges:
            continue
        lines += [f"  {edge}" for edge in _edges(gm, node, hidden, parts, converted, edges)]
    lines += [f"  {line}" for line in _legend(bool(time_last))]
    return "\n".join([*lines, "}", ""])


def _rows(gm: fx.GraphModule) -> dict[fx.Node, list[Row]]:
    """Return for each node the rows of the neurons that it runs: its own, or those inside a leaf."""
    leaves = {node.target: node for node in reversed(gm.graph.nodes) if node.op == "call_module"}
    found: dict[fx.Node, list[Row]] = {}
    for neuron, row in zip(neurons(gm), selection(gm).rows, strict=True):
        node = neuron.node
        if node is None:
            node = next(leaf for path, leaf in leaves.items() if neuron.name.startswith(f"{path}."))
        found.setdefault(node, []).append(row)
    return found


def _hidden(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that are not drawn: shapes and arithmetic on them, and modules that are arguments of calls."""
    modules = {n for n in gm.graph.find_nodes(op="get_attr") if all(u.target in _TAKE_MODULES for u in n.users)}
    return shape_arithmetic(gm.graph) | modules


def _label(gm: fx.GraphModule, node: fx.Node, rows: list[Row]) -> Iterator[str]:
    """Yield the lines of text in the node's box."""
    if node.op == "call_module" and not (len(rows) == 1 and rows[0].layer.partition("@")[0] == node.target):
        yield str(node.target)
        yield type(gm.get_submodule(node.target)).__name__
    elif node.op == "output":
        yield "output"
    elif node.target is norm_affine:
        norm = node.args[0]
        yield str(norm.target)
        yield f"{type(gm.get_submodule(norm.target)).__name__}, fused"
    elif node.target is run_time_last:
        path = node.args[0].target
        yield str(path)
        yield f"{type(gm.get_submodule(path)).__name__}, time-last: {node.args[2]}"
    elif not rows:
        yield node.name
        function = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and not node.name.startswith(function):
            yield function
    for row in rows:
        yield row.layer
        yield f"{row.source}, k = {row.order}, d = {row.dilation}"
        same = row.eval_kernel in ("", row.kernel)
        yield row.kernel if same else f"{row.kernel} (eval: {row.eval_kernel})"
        if row.forward_ms is not None and row.backward_ms is not None:
            yield f"{row.forward_ms:.3f} + {row.backward_ms:.3f} ms"


def _edges(
    gm: fx.GraphModule,
    node: fx.Node,
    hidden: set[fx.Node],
    parts: dict[fx.Node, object],
    converted: set[fx.Node],
    contracted: set[fx.Node],
) -> Iterator[str]:
    """Yield the edges that end at ``node``; a conversion with one reader is an edge itself."""
    for source in node.all_input_nodes:
        if source in hidden:
            continue
        attributes = []
        if node in converted:
            attributes = _conversion(gm, node)
        elif source in contracted:
            attributes = _conversion(gm, source)
            source = source.args[0]
        elif source in converted:
            attributes = [f"color={_quoted(_CONVERSION)}"]
        part = parts.get(source)
        if part == 2:  # drawn with the scale, part 1
            continue
        if part is not None:
            source = source.args[0]
            if part == 1:
                attributes = ["style=dashed", f"label={_quoted('scale, shift')}"]
        about = f" [{', '.join(attributes)}]" if attributes else ""
        yield f"{_quoted(source.name)} -> {_quoted(node.name)}{about};"


def _conversion(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """Return the attributes of the edge that is the conversion ``node``."""
    target = str(Layout.parse(node.args[2])).replace("_", "-")
    size = _bytes(gm, node)
    text = f"to {target}" if size is None else f"to {target}\n{_readable(size)}"
    return [
        f"color={_quoted(_CONVERSION)}",
        "penwidth=2",
        f"fontcolor={_quoted(_CONVERSION)}",
        f"label={_quoted(text)}",
    ]


def _bytes(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Return the bytes of the tensor that a conversion copies, or None if its shape is not known."""
    meta = input_meta(node) or input_meta(node.args[0])
    if meta is not None:
        shape, dtype, _ = meta
        return torch.Size(shape).numel() * dtype.itemsize
    record = record_of(gm)
    for neuron in neurons(gm):  # pickles lose node.meta, but keep measurements of the neurons on either side
        if neuron.node is not None and (neuron.node is node.args[0] or neuron.input is node):
            measured = record.measured.get(neuron.name)
            if measured is not None:
                return torch.Size(measured.shape).numel() * getattr(torch, measured.dtype).itemsize
    return None


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _legend(both: bool) -> Iterator[str]:
    """Yield the legend of layouts, if the graph has both."""
    if not both:
        return
    yield "subgraph cluster_legend {"
    yield "  label=layouts; fontname=Helvetica; fontsize=10;"
    for layout, color in _COLORS.items():
        name, text = _quoted(f"legend {layout}"), _quoted(str(layout).replace("_", "-"))
        yield f"  {name} [shape=box, style=filled, fillcolor={_quoted(color)}, label={text}];"
    yield "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
