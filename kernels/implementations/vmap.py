"""A vmap that works inside custom ops, even if a compiled graph calls them."""

from __future__ import annotations

import torch

__all__ = ["vmap"]

_FUNCTORCH = (
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchBatched",
    "FuncTorchVmapMode",
)


def vmap(function, in_dims=0, out_dims=0):
    """Return ``torch.vmap`` of ``function``, usable inside a custom op.

    Compiled graphs call ops with functorch's dispatch keys excluded, and batched tensors would then reach kernels that
    access their storage ("Cannot access storage of BatchedTensorImpl", torch 2.13). So the keys are enabled again for
    the call.
    """
    batched = torch.vmap(function, in_dims, out_dims)

    def run(*args):
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for name in _FUNCTORCH:
            excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            return batched(*args)

    return run
