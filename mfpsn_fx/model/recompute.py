"""Detection of the recomputation of a checkpointed layer within backward, and of its mask."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RecomputeGuard"]


class RecomputeGuard:
    """Tells the recomputation of one layer from its first run; copies and pickles of the layer get a new guard.

    Checkpointing stores neither the mask of a run nor an id of it. A recomputation is therefore known to have the right
    mask only if all checkpointed runs since the last recomputation had the same.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []  # distinct masks of the runs since the last recomputation, two at most
        self._recomputing = False

    def __reduce__(self):
        return RecomputeGuard, ()

    def __deepcopy__(self, memo):
        return RecomputeGuard()

    def is_recompute(self, mask: Tensor | None, training: bool, layer: str) -> bool:
        """Return True if this run recomputes an earlier one, which has updated the running statistics already.

        Raises:
            RuntimeError: it does, and the earlier run may have had another mask.
        """
        if torch.compiler.is_compiling():  # the compiler recomputes values, not calls
            return False
        if torch._C._current_graph_task_id() == -1:  # not in backward
            if self._recomputing:
                self._masks, self._recomputing = [], False
            if training and _may_be_checkpointed() and not any(mask is other for other in self._masks):
                self._masks = [*self._masks, mask][:2]
            return False
        masks = self._masks
        if masks and (len(masks) > 1 or masks[0] is not mask):
            self._masks = []
            found = "no mask" if mask is None else "a mask"
            before = "under several" if len(masks) > 1 else "without one" if masks[0] is None else "under another"
            raise RuntimeError(
                f"{layer}: its checkpointed forward runs again with {found}, and ran {before} before; call backward "
                "inside the valid_steps that forward had, and before the next forward"
            )
        self._recomputing = True
        return True


def _may_be_checkpointed() -> bool:
    """Return True if gradients are off or saved-tensor hooks are set, as in the first run of a checkpointed layer."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
