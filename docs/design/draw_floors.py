"""Draw docs/design/floors.svg: the folders, the floors that they are on, and who imports whom.

Run with ``python docs/design/draw_floors.py [FILE]`` (needs matplotlib). Everything is read from the sources' imports.
"""

from __future__ import annotations

import ast
import collections
import pathlib
import sys

import networkx as nx

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLOORS = {"mfpsn_fx": 4, "mfpsn_fx.passes": 3, "mfpsn_fx.model": 2, "mfpsn_fx.kernels": 1}
FOLDERS = {"mfpsn_fx.kernels": "kernels", "mfpsn_fx.passes": "passes", "mfpsn_fx": "mfpsn_fx"}
TITLES = {4: "face: what users call", 3: "passes: a graph in, a graph out", 2: "model: neurons, sources, capture",
          1: "kernels: numerics, the op, its kernels"}  # fmt: skip


def folder_of(module: str) -> pathlib.Path:
    """Return the folder in the repository in which the package ``module`` stands."""
    for package, folder in FOLDERS.items():
        if module == package or module.startswith(f"{package}."):
            return ROOT / folder / module.removeprefix(package).lstrip(".").replace(".", "/")
    raise LookupError(module)


def modules() -> dict[str, pathlib.Path]:
    """Return every module of ours and its file; a package is its ``__init__``."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def floor(module: str) -> int:
    """Return the floor that ``module`` is on, 1 to 4."""
    return next(level for package, level in sorted(FLOORS.items(), key=lambda p: -len(p[0]))
                if module == package or module.startswith(f"{package}."))  # fmt: skip


def imports(module: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> list[tuple[str, int]]:
    """Return the modules of ours that a file imports when it is imported itself, and the lines where it does."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        found += [(name, node.lineno) for name in names if name in known]
    return found


def _running(tree: ast.AST):
    """Every import that runs with the module: neither in a function nor for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        else:
            yield from _running(node)


def folders() -> nx.DiGraph:
    """Return the folders as nodes and imports between them as edges, weighted by how many there are."""
    known = modules()
    graph = nx.DiGraph()
    home = {
        module: module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in known.items()
    }
    graph.add_nodes_from(dict.fromkeys(home.values()))
    counts: collections.Counter = collections.Counter()
    for module, path in known.items():
        for name, _ in imports(module, path, known):
            if home[name] != home[module]:
                counts[home[module], home[name]] += 1
    graph.add_weighted_edges_from((a, b, count) for (a, b), count in counts.items())
    return graph


def draw(target: pathlib.Path) -> None:
    """Draw :func:`folders` into ``target``."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "floors"  # the same file for the same imports
    from matplotlib import pyplot

    graph = folders()
    files = collections.Counter(
        module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in modules().items()
    )
    places = {}
    for level in TITLES:
        row = sorted(module for module in graph if floor(module) == level)
        for index, module in enumerate(row):
            places[module] = ((index + 1) / (len(row) + 1) * 12, 2.2 * level + (0.55 if index % 2 else 0.0))
    figure, axes = pyplot.subplots(figsize=(12, 8.5))
    for level, title in TITLES.items():
        axes.axhspan(2.2 * level - 0.6, 2.2 * level + 1.25, color="0.95")
        axes.text(0.1, 2.2 * level + 1.0, f"{level}  {title}", color="0.35", fontsize=10)
    weights = [0.4 + 0.12 * graph.edges[edge]["weight"] for edge in graph.edges]
    nx.draw_networkx_edges(
        graph, places, ax=axes, width=weights, edge_color="tab:blue", alpha=0.45, arrowsize=9, node_size=2600,
        connectionstyle="arc3,rad=0.06",
    )  # fmt: skip
    for module, (x, y) in places.items():
        name = module.rpartition(".")[2] if module.count(".") > 1 else module.removeprefix("mfpsn_fx.")
        axes.text(
            x, y, f"{name}/\n{files[module]} files", ha="center", va="center", fontsize=9,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.3"},
        )  # fmt: skip
    axes.set_xlim(0, 12)
    axes.set_ylim(1.4, 2.2 * 4 + 1.4)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("floors.svg")
    draw(out)
    print(f"wrote {out}")
