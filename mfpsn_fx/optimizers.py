"""Parameter groups for optimizers, and a check that an optimizer holds the model's parameters."""

from __future__ import annotations

import torch
from torch import nn

from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import source_paths

__all__ = ["check_optimizer", "param_groups"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two parameter groups for an optimizer: synapses with weight decay, all other parameters without.

    Without decay are neurons (W, γ, β of ``MulFreePSN``, and the parameters of neurons that were not converted), norm
    layers and biases (any parameter of fewer than two dims). Decay of W would only raise the neuron's effective
    learning rate, as its normalization cancels the scale; decay of β would pull thresholds towards the mean.

    Args:
        model: a converted network, possibly compiled, or any other module.
        weight_decay: of the first group.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``; each parameter
        once, in the model's order. A group may be empty.

    Raises:
        ValueError: ``weight_decay`` is negative or not a number.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)) or not weight_decay >= 0:
        raise ValueError(f"weight_decay must be a number of at least 0, found {weight_decay!r}")
    exempt: set[int] = set()
    for module in [*model.modules(), *source_paths(model).values()]:
        if isinstance(module, (MulFreePSN, *_NORMS)):
            exempt.update(id(p) for p in module.parameters(recurse=False))
    for module in source_paths(model).values():
        exempt.update(id(p) for p in module.parameters())
    decayed, undecayed = [], []
    for parameter in model.parameters():
        (undecayed if id(parameter) in exempt or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": float(weight_decay)}, {"params": undecayed, "weight_decay": 0.0}]


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise unless ``optimizer`` holds all parameters of ``model`` that require gradients, and no others.

    An optimizer made before ``convert`` holds the source's parameters: its steps change the source, not the converted
    network.

    Raises:
        ValueError: it lacks parameters of the model, or holds others; the message names both.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    foreign = len(held - set(names))
    if not lacking and not foreign:
        return
    faults = []
    if lacking:
        shown = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        faults.append(f"lacks {len(lacking)} of {len(names)} parameters of the model ({shown})")
    if foreign:
        faults.append(f"holds {foreign} tensors that are not parameters of the model")
    raise ValueError(
        f"the optimizer {' and '.join(faults)}. Was it made before convert? Make it afterwards: "
        "torch.optim.AdamW(mfpsn_fx.param_groups(model, weight_decay), lr=…)"
    )
