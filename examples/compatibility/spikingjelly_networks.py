"""SpikingJelly 2.0's own models at small inputs, for ``python -m mfpsn_fx compatibility``."""

from __future__ import annotations

import importlib.util
import sys
import types

import torch
from torch import nn

if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
    # Its ResNets and VGGs import torchvision for downloads only, and no wheel of it fits torch's CPU build.
    outer, inner = types.ModuleType("torchvision"), types.ModuleType("torchvision._internally_replaced_utils")
    inner.load_state_dict_from_url = None
    outer._internally_replaced_utils = inner
    sys.modules.update({"torchvision": outer, "torchvision._internally_replaced_utils": inner})

from spikingjelly.activation_based import encoding, functional, layer, model, neuron
from spikingjelly.activation_based.model import (
    parametric_lif_net,
    sew_resnet,
    snas_net,
    spike_dhs,
    spiking_resnet,
    spiking_vgg,
    spiking_vggws_ottt,
)

STEPS, BATCH = 4, 2


def images(size: int = 32, channels: int = 3, batch: int = BATCH):
    """(T, N, C, H, W)."""
    return lambda: (torch.rand(STEPS, batch, channels, size, size),)


def multi_step(build, **arguments):
    def made():
        net = build(**arguments)
        functional.set_step_mode(net, "m")
        return net

    return made


def entry(name, build, example, **more):
    return {"library": "SpikingJelly", "name": name, "build": build, "example": example, **more}


def network(name, build, example, refusal: str = "", **arguments):
    return entry(name, multi_step(build, **arguments), example, refusal=refusal)


LIF = {"spiking_neuron": neuron.LIFNode, "num_classes": 10}
PLIF = {"spiking_neuron": neuron.ParametricLIFNode}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
           "wide_resnet50_2", "wide_resnet101_2")  # fmt: skip

NETWORKS = [network(f"spiking_{kind}", getattr(spiking_resnet, f"spiking_{kind}"), images(), **LIF) for kind in RESNETS]
NETWORKS += [
    network(f"sew_resnet18, {function}", sew_resnet.sew_resnet18, images(), cnf=function, **LIF)
    for function in ("ADD", "AND", "IAND")
]
NETWORKS += [
    network(f"sew_{kind}, ADD", getattr(sew_resnet, f"sew_{kind}"), images(), cnf="ADD", **LIF) for kind in RESNETS[1:]
]
NETWORKS += [
    network(f"spiking_vgg{depth}{norm}", getattr(spiking_vgg, f"spiking_vgg{depth}{norm}"), images(), **LIF)
    for depth in (11, 13, 16, 19)
    for norm in ("", "_bn")
]
NETWORKS += [
    network("MNISTNet", parametric_lif_net.MNISTNet, images(28, 1), channels=8, **PLIF),
    network("FashionMNISTNet", parametric_lif_net.FashionMNISTNet, images(28, 1), channels=8, **PLIF),
    network("NMNISTNet", parametric_lif_net.NMNISTNet, images(34, 2), channels=8, **PLIF),
    network("CIFAR10Net", parametric_lif_net.CIFAR10Net, images(32), channels=8, **PLIF),
    network("CIFAR10DVSNet", parametric_lif_net.CIFAR10DVSNet, images(128, 2), channels=8, **PLIF),
    network("DVSGestureNet", parametric_lif_net.DVSGestureNet, images(128, 2), channels=8, **PLIF),
    network("Spikformer", model.Spikformer, images(), img_size_h=32, img_size_w=32, patch_size=4, num_classes=10,
            embed_dims=64, num_heads=4, depths=2),
    network("Spikformer, (N, C, H, W)", model.Spikformer, lambda: (torch.rand(BATCH, 3, 32, 32),), T=STEPS,
            img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=64, num_heads=4, depths=1),
    network("spikformer_cifar10", model.spikformer_cifar10, images()),
    network("spikformer_ti", model.spikformer_ti, images(), img_size_h=32, img_size_w=32, num_classes=10),
    network("spikformer_s", model.spikformer_s, images(), img_size_h=32, img_size_w=32, num_classes=10),
    network("QKFormer, token", model.QKFormer, images(), num_classes=10, embed_dims=64, num_heads=(2, 2, 4),
            depths=(1, 1, 1)),
    network("QKFormer, channel", model.QKFormer, images(), num_classes=10, embed_dims=64, num_heads=(2, 2, 4),
            depths=(1, 1, 1), qka_type="channel"),
    network("qkformer_10_384", model.qkformer_10_384, images(), num_classes=10),
    network("MaxFormer", model.MaxFormer, images(), num_classes=10, embed_dims=64, depths=(1, 1, 1)),
    network("maxformer_10_384", model.maxformer_10_384, images(), num_classes=10),
    network("maxformer_cifar", model.maxformer_cifar, images(), num_classes=10),
    network("SpikeDrivenTransformer", model.SpikeDrivenTransformer, images(), num_classes=10, embed_dims=64,
            num_heads=4, depths=2),
    network("sdt_8_384", model.sdt_8_384, images(), num_classes=10),
    network("ms_resnet18", model.ms_resnet18, images(), num_classes=10),
    network("ms_resnet34", model.ms_resnet34, images(), num_classes=10),
    network("max_resnet18", model.max_resnet18, images(), num_classes=10),
    network("MASNN", model.MASNN, images(32, 2), T=STEPS, channels=(16, 16, 16), reduction_t=2),
    network("masnn_dvs128_gesture", model.masnn_dvs128_gesture, lambda: (torch.rand(10, BATCH, 2, 32, 32),), T=10),
    network("att_ms_resnet18", model.att_ms_resnet18, images(), T=STEPS, num_classes=10),
]  # fmt: skip


class Looping(nn.Module):
    """In step mode 's', with the loop over time in the forward: on one image, or on one image a step."""

    def __init__(self, net: nn.Module, sequence: bool) -> None:
        super().__init__()
        self.net, self.sequence = net, sequence

    def forward(self, x):
        rate = 0.0
        for t in range(STEPS):
            rate += self.net(x[t] if self.sequence else x)
        return rate / STEPS


def fully_connected():
    net = nn.Sequential(layer.Flatten(), layer.Linear(64, 32, bias=False), neuron.LIFNode(), layer.Linear(32, 10),
                        neuron.LIFNode())  # fmt: skip
    return Looping(nn.Sequential(encoding.PoissonEncoder(), net), sequence=False)


def convolutional():
    net = nn.Sequential(layer.Conv2d(2, 8, 3, padding=1), neuron.ParametricLIFNode(), layer.MaxPool2d(2),
                        layer.Flatten(), layer.Linear(128, 10), neuron.IFNode())  # fmt: skip
    return Looping(net, sequence=True)


def snas():
    settings = types.SimpleNamespace(timestep=STEPS, second_avgpooling=4, dataset="cifar10", celltype="forward",
                                     threshold=1.0, tau=4.0 / 3)  # fmt: skip
    return snas_net.SNASNet(settings, torch.tensor([[0, 2, 1, 3], [0, 0, 2, 1], [0, 0, 0, 2], [0, 0, 0, 0]]))


def dhs():
    settings = types.SimpleNamespace(fea_step=3, fea_num_layers=8, fea_block_multiplier=3, fea_filter_multiplier=48)
    net = spike_dhs.SpikeDHS(3, settings)
    # A tensor here, on which its forward branches: there Dynamo breaks the graph, converted or not.
    net.feature.cells[0].downup_sample = int(net.feature.cells[0].downup_sample)
    functional.set_step_mode(net, "m")
    return net


NETWORKS += [
    entry(
        "fully connected, Poisson, loop in step mode 's'",
        fully_connected,
        lambda: (torch.rand(BATCH, 1, 8, 8),),
    ),
    entry(
        "convolutional, loop in step mode 's'",
        convolutional,
        lambda: (torch.rand(STEPS, BATCH, 2, 8, 8),),
    ),
    entry(
        "SNASNet, accept=('batch_statistics',)",
        snas,
        lambda: (torch.rand(BATCH, 3, 32, 32),),
        options={"accept": ("batch_statistics",)},
    ),
    entry(
        "SpikeDHS (downup_sample an int)",
        dhs,
        lambda: (torch.rand(BATCH, 3, 32, 32),),
        options={"strict": False},
        unused=True,
    ),
    network("ottt_spiking_vggws", spiking_vggws_ottt.ottt_spiking_vggws, images(), "trains online", num_classes=10),
]
