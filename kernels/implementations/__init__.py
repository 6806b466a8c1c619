"""Implementations of the neuron op; each module registers its kernels on import, and all are imported here."""

import importlib
import pkgutil

for _name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if not _name.startswith("triton_"):  # programs, which need Triton: fused_triton imports them on first use
        importlib.import_module(f"{__name__}.{_name}")
