"""Import this first: it makes ``mfpsn_fx`` importable from a bare checkout, where nothing can be installed.

``kernels/`` and ``passes/`` stand at the root of the repository and are installed as ``mfpsn_fx.kernels`` and
``mfpsn_fx.passes``. Without an installation a finder says so to Python. An installed ``mfpsn_fx`` is left alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "tabulate", "tqdm", "networkx")  # what pyproject.toml states
_MOVED = {"mfpsn_fx.kernels": ROOT / "kernels", "mfpsn_fx.passes": ROOT / "passes"}


class _Moved:
    """A finder for the packages whose folders do not stand where their names say."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _MOVED:
            return None
        folder = _MOVED[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def missing(names: tuple[str, ...] = NEEDED) -> list[str]:
    """The packages of ``names`` that are not there."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def installed() -> bool:
    """Whether ``mfpsn_fx`` is installed, from wherever; what a build left in the checkout itself is no installation."""
    try:
        found = importlib.metadata.distribution("mfpsn_fx")
    except importlib.metadata.PackageNotFoundError:
        return False
    return pathlib.Path(found.locate_file("")).resolve() != ROOT


def use_checkout() -> None:
    """Make ``import mfpsn_fx`` work; exit with what to carry along if it cannot."""
    if lacking := missing():
        files = ", ".join(f"{name}-*.whl" for name in lacking)
        raise SystemExit(
            f"{', '.join(lacking)} missing: pip install {' '.join(lacking)}; on a machine without a network carry "
            f"{files} along and pip install --no-deps --no-index them (benchmarks/gpu_check.sh does: WHEELS=folder)"
        )
    if not installed():
        sys.path.insert(0, str(ROOT))
        sys.meta_path.insert(0, _Moved)


use_checkout()
