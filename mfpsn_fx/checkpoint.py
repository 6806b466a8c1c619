"""Loading a checkpoint of the source network into the converted one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.bn_fold import deviation
from mfpsn_fx.model.capturing.capture import ROOT_LEAF, copied
from mfpsn_fx.model.integrator import LeakyIntegrator
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import NotAFilterError, SourceNeuron, describe
from mfpsn_fx.model.sources.stepping import stepping_of
from mfpsn_fx.passes import Example, InitializeNeurons, PassContext, Pipeline

from .selection import graph_of

__all__ = ["load_source_checkpoint"]


def load_source_checkpoint(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *example_args,
    example_kwargs: Mapping | None = None,
    source: nn.Module | None = None,
) -> None:
    """Load a ``state_dict`` of the source network into the converted network, in place.

    Synapses, norms and buffers are loaded by name; neurons are initialized from their sources, as in ``convert``. If
    the checkpoint has parameters of neurons (PLIF's ``w``, snnTorch's ``beta``), ``source`` is needed to interpret
    them. On any error nothing is loaded.

    Args:
        model: a network that ``convert`` returned.
        state_dict: of a source network of the same architecture.
        example_args, example_kwargs: one real batch, on which thresholds are set (as in ``convert``). Without it the
            network evaluates just as well, but its first step in training moves the thresholds.
        source: a network of the source's class, with any weights; it is not changed.

    Raises:
        TypeError: ``model`` is not a converted network.
        ValueError: keys are unknown or missing, or shapes differ (all in one error); the checkpoint has parameters of
            neurons and ``source`` is not given, or ``source`` has another architecture.
    """
    gm = graph_of(model)
    kwargs = dict(example_kwargs or {})
    kinds = (MulFreePSN, LeakyIntegrator)
    neurons = {path: m for path, m in gm.named_modules(remove_duplicate=False) if isinstance(m, kinds)}
    own = {key: value for key, value in gm.state_dict().items() if not _within(key, neurons)}
    prefix = max(("", f"{ROOT_LEAF}."), key=lambda p: sum(p + key in own for key in state_dict))
    given = {prefix + key: value for key, value in state_dict.items()}
    of_neurons = [key for key in given if key not in own and _within(key, neurons)]
    _check(own, given, of_neurons, prefix)
    described: dict[int, SourceNeuron | LeakyIntegrator] = {}
    if of_neurons:
        if source is None:
            shown = ", ".join(key.removeprefix(prefix) for key in of_neurons[:5])
            raise ValueError(
                f"the checkpoint holds parameters of {len({_within(k, neurons) for k in of_neurons})} neurons ({shown}"
                f"{', …' if len(of_neurons) > 5 else ''}): give source=, a network of the class that was converted, "
                "by which they are interpreted"
            )
        described = _descriptions(source, state_dict, neurons, prefix)
    with torch.no_grad():
        for key, value in given.items():
            if key in own:
                own[key].copy_(value)
        for module in {id(m): m for m in neurons.values()}.values():
            if isinstance(module, LeakyIntegrator):
                module.load_state_dict(described.get(id(module), module).state_dict())
            elif module.source is not None:
                module.source = described.get(id(module), module.source)
                _restart(module)
    pipeline = Pipeline([InitializeNeurons("source")], given=("neurons", "dilations"))
    pipeline(gm, PassContext(Example(example_args, kwargs)))


def _within(key: str, neurons: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the neuron that the key belongs to, or None."""
    return next((path for path in neurons if key.startswith(f"{path}.")), None)


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor], of_neurons: list[str], prefix: str) -> None:
    faults = []
    known = set(of_neurons)
    faults += [f"unknown key {key.removeprefix(prefix)}" for key in given if key not in own and key not in known]
    # constants made by tracing exist in the converted network alone
    faults += [
        f"missing key {key.removeprefix(prefix)}"
        for key in own
        if key not in given and not key.rpartition(".")[2].startswith("_tensor_constant")
    ]
    faults += [
        f"{key.removeprefix(prefix)} has shape {tuple(given[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if faults:
        raise ValueError("the checkpoint does not fit the network that was converted:\n  " + "\n  ".join(faults))


def _descriptions(
    source: nn.Module, state_dict: Mapping[str, Tensor], neurons: Mapping[str, nn.Module], prefix: str
) -> dict[int, SourceNeuron | LeakyIntegrator]:
    """Return each source neuron's description under the checkpoint, by the id of the module that replaced it."""
    twin = copied(source)
    try:
        twin.load_state_dict(dict(state_dict))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the {type(source).__name__} given as source: {error}") from error
    found = {}
    for path, module in neurons.items():
        readout = isinstance(module, LeakyIntegrator)
        if not readout and module.source is None:
            continue
        name = path.removeprefix(prefix)
        # path@2 is the second use of the neuron at path
        name = (name.removesuffix("_membrane") if readout else name).partition("@")[0]
        try:
            neuron = twin.get_submodule(name)
            if getattr(neuron, "step_mode", None) == "s":  # convert switches or rolls up such sources
                neuron.step_mode = "m"
            found[id(module)] = stepping_of(neuron).leaky_integrator(neuron) if readout else describe(neuron)
        except AttributeError as error:
            raise ValueError(f"{name}: the {type(source).__name__} given as source has no neuron there") from error
        except NotAFilterError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def _restart(module: MulFreePSN) -> None:
    """Set γ, β and statistics so that they fold to the source's threshold for any W, until an example sets them."""
    module.running_mean.zero_()
    module.running_var.fill_(1)
    module.gamma.copy_(deviation(module.running_var, module.eps))
    module.beta.copy_(-module.source.threshold.to(module.beta).expand_as(module.beta))
