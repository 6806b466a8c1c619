"""SpikingJelly's dropout in a forward that loops over time: one mask for all steps, also after roll-up."""

from __future__ import annotations

from torch import Tensor, nn

from ..sources.description import qualified_name

__all__ = ["SharedMask", "wrap_dropouts"]

_DROPOUTS = tuple(f"spikingjelly.activation_based.layer.dropout.{name}" for name in ("Dropout", "Dropout2d"))


class SharedMask(nn.Module):
    """Call SpikingJelly's dropout, which keeps its mask until it is reset, for one step (N, *).

    In a rolled-up graph it is replaced by the dropout itself, in step mode 'm' on (T, N, *); where all steps have the
    same input, it remains.
    """

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        dropout.reset()
        dropout.step_mode = "m"
        self.dropout = dropout
        self.training = dropout.training

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x.unsqueeze(0)).squeeze(0)


def wrap_dropouts(model: nn.Module) -> None:
    """Wrap SpikingJelly's dropouts of ``model`` that are in step mode 's', in place."""
    wrapped: dict[nn.Module, SharedMask] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            known = qualified_name(type(child)) in _DROPOUTS and child.step_mode == "s"
            if known or child in wrapped:
                wrapped[child] = wrapped.get(child) or SharedMask(child)
                parent._modules[name] = wrapped[child]
