"""The torch.compile backend: what it plans, what it leaves, its compilers, caches, shapes and graph breaks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import mfpsn_fx
from mfpsn_fx import Backend, MulFreePSN
from mfpsn_fx.backend import backend_pipeline, count_recompiles_by_module
from mfpsn_fx.kernels import Layout
from mfpsn_fx.kernels.layout import to_layout
from mfpsn_fx.model import recompute as reruns
from mfpsn_fx.model.results import Candidate, Measured
from mfpsn_fx.passes import (
    BindKernels,
    InsertConversions,
    LowerConversions,
    Pass,
    PlanLayout,
    PropagateShapes,
    Result,
    neurons,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """An inner compiler that keeps the graphs it is given and hands them to aot_eager."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, inputs):
        self.graphs.append(copy.deepcopy(gm))
        return lookup_backend("aot_eager")(gm, inputs)


class Told(Pass):
    """In the place of autoselect: (layout, kernel) → milliseconds as they are given, 9 for all others."""

    name, gives = "told", ("selection",)

    def __init__(self, times):
        self.times = times

    def call(self, gm, context):
        known = [(layout, kernel) for layout in Layout for kernel in ("shifted-add", "vmap-mm")]
        ms = [self.times.get(way, 9.0) for way in known]
        candidates = tuple(
            Candidate(str(layout), kernel, t, t, t) for (layout, kernel), t in zip(known, ms, strict=True)
        )
        context.measurements = {
            n.name: Measured(n.meta[0], "float64", "cpu", candidates) for n in neurons(gm)
        }  # fmt: skip
        return Result(gm)


def planner(**times):
    """A backend's passes, with times that favor one way: ``planner(time_last="shifted-add")``."""
    told = {(Layout(layout), kernel): 1e-4 for layout, kernel in times.items()}
    return [PropagateShapes(), Told(told), PlanLayout(), InsertConversions(), BindKernels(), LowerConversions()]


def chain(*kernels, width=4):
    """Linear layers and neurons bound to these kernels, or left unbound for an empty name."""
    layers = []
    for index, kernel in enumerate(kernels):
        one = MulFreePSN(width, dilation=1 + index % 3)
        one.path = f"sn{index}"
        one.bind(kernel=kernel, eval_kernel=kernel)
        layers += [nn.Linear(width, width), one]
    return nn.Sequential(*layers)


def train(model, call, batches, lr=0.05):
    """Losses of SGD steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr), []
    for x in batches:
        optimizer.zero_grad()
        loss = (call(x) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def quick(model, x, **options):
    return mfpsn_fx.convert(model, x, repeats=1, progress=False, **options)


class TestTraining:
    def test_to_the_bit_with_aot_eager(self, net, example):
        """Ten steps; one graph for training, one for evaluation, no breaks."""
        converted = quick(net, example, kernels="shifted-add", layout="time_first")
        plain = copy.deepcopy(converted)
        batches = [torch.randn_like(example) for _ in range(10)]
        compiled = torch.compile(converted, backend=Backend(inner="aot_eager"))
        counters.clear()
        assert torch.equal(train(converted, compiled, batches), train(plain, plain, batches))
        for ours, theirs in zip(converted.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        assert counters["stats"]["unique_graphs"] == 1
        converted.eval(), plain.eval()
        with torch.no_grad():
            assert torch.equal(compiled(example), plain(example))
        converted.train()
        compiled(example)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]

    def test_with_inductor_in_double(self, net, example):
        converted = quick(net.double(), example.double(), layout="time_first")
        plain = copy.deepcopy(converted)
        batches = [torch.randn_like(example).double() for _ in range(10)]
        compiled = torch.compile(converted, backend="mfpsn_fx")
        counters.clear()
        ours, theirs = train(converted, compiled, batches), train(plain, plain, batches)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        for name, value in converted.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-9)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


class TestPlanning:
    def test_an_unconverted_network_is_planned(self):
        """Layouts, conversions and kernels as the times say; values, statistics and gradients as before."""
        model = chain("", "", "").double()
        plain, x = copy.deepcopy(model), torch.randn(6, 5, 4, 4, dtype=torch.float64)
        inner = Recorder()
        compiled = torch.compile(model, backend=Backend(planner(time_last="shifted-add"), inner), fullgraph=True)
        for ours, theirs in ((compiled(x), plain(x)),):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            ours.square().sum().backward(), theirs.square().sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        (graph,) = inner.graphs
        assert [(n.layout, n.kernel) for n in neurons(graph)] == [("time_last", "shifted-add")] * 3
        targets = [node.target for node in graph.graph.nodes]
        assert to_layout not in targets  # compilers' caches do not know it
        assert targets.count("movedim") >= 2
        assert "mfpsn_measured" not in graph.meta

    def test_times_decide(self):
        inner = Recorder()
        model, x = chain("", ""), torch.randn(6, 5, 4, 4)
        torch.compile(model, backend=Backend(planner(time_first="vmap-mm"), inner))(x)
        assert [(n.layout, n.kernel) for n in neurons(inner.graphs[0])] == [("time_first", "vmap-mm")] * 2
        assert "movedim" not in [node.target for node in inner.graphs[0].graph.nodes]

    def test_training_and_evaluation_are_planned_apart(self):
        inner = Recorder()
        model, x = chain("", ""), torch.randn(6, 5, 4, 4)
        compiled = torch.compile(model, backend=Backend(inner=inner))
        for mode in (True, False):
            model.train(mode)
            compiled(x)
        assert [[bool(n.kernel) for n in neurons(graph)] for graph in inner.graphs] == [[True] * 2, [False] * 2]
        assert [[bool(n.eval_kernel) for n in neurons(graph)] for graph in inner.graphs] == [[False] * 2, [True] * 2]

    @pytest.mark.parametrize("replan", [False, True])
    def test_bound_neurons(self, replan, monkeypatch):
        """They keep what they have, also beside unbound ones, unless they are to be planned anew."""
        ran = []
        monkeypatch.setattr(
            sys.modules["mfpsn_fx.backend"],  # the name in the package is the function's
            "backend_pipeline",
            lambda layout: ran.append(layout) or mfpsn_fx.Pipeline(planner(time_last="shifted-add"), ("neurons",)),
        )
        for kernels in (("vmap-mm", "vmap-mm"), ("vmap-mm", ""), ("", "")):
            inner = Recorder()
            torch._dynamo.reset()
            backend = Backend(inner=inner, replan=replan)
            torch.compile(chain(*kernels), backend=backend)(torch.randn(6, 5, 4, 4))
            kept = [kernel if kernel and not replan else "shifted-add" for kernel in kernels]
            assert [n.kernel for n in neurons(inner.graphs[0])] == kept
        assert ran == (["auto"] * 3 if replan else ["keep", "auto"])

    def test_a_bound_neuron_keeps_its_layout(self):
        """Beside one that has yet to be measured, which stays in its own as well."""
        model = nn.Sequential(MulFreePSN(4, layout="time_last"), MulFreePSN(4, layout="time_last"))
        model[0].bind(kernel="shifted-add")
        inner = Recorder()
        torch.compile(model, backend=Backend(inner=inner))(torch.randn(5, 4, 4, 6))
        first, second = neurons(inner.graphs[0])
        assert (first.layout, first.kernel, second.layout) == ("time_last", "shifted-add", "time_last")
        assert second.kernel

    def test_the_pipeline_can_be_taken_apart(self):
        passes = backend_pipeline().without("plan_layout")
        inner = Recorder()
        torch.compile(chain(""), backend=Backend(passes, inner))(torch.randn(6, 5, 4, 4))
        (one,) = neurons(inner.graphs[0])
        assert one.layout == "time_first"
        assert one.kernel


class TestShapes:
    def test_one_graph_serves_all_batches(self):
        """Planned for the first of them."""
        inner = Recorder()
        backend = Backend(planner(time_last="vmap-mm"), inner)
        compiled = torch.compile(chain("", ""), backend=backend, dynamic=True)
        counters.clear()
        for batch in (5, 2, 9, 3):  # no other dim is 5: dims of one size are one symbol to Dynamo
            compiled(torch.randn(6, batch, 4, 4)).sum().backward()
        assert counters["stats"]["unique_graphs"] == 1
        assert [(n.layout, n.kernel) for n in neurons(inner.graphs[-1])] == [("time_last", "vmap-mm")] * 2
        assert not counters["graph_break"]


class Block(nn.Module):
    """A layer with a graph break before its neuron: it is a frame of its own, as each of its kind."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.sn = nn.Linear(3, 3), MulFreePSN(3, dilation=1 + index % 3)
        self.sn.path = f"{index}.sn"
        self.sn.bind(kernel="shifted-add", eval_kernel="shifted-add")

    def forward(self, x):
        x = self.linear(x)
        torch._dynamo.graph_break()
        return self.sn(x)


class Break(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def broken_in_the_middle():
    """nn.Sequential's loop cannot go on behind a break: each of its layers becomes a frame."""
    layers = list(chain(*["shifted-add"] * 20, width=3))
    return nn.Sequential(*layers[:20], Break(), *layers[20:])


class TestGraphBreaks:
    @pytest.mark.parametrize("make", [lambda: nn.Sequential(*map(Block, range(20))), broken_in_the_middle])
    def test_twenty_neurons_behind_breaks_stay_compiled(self, make, monkeypatch):
        eager = []
        looked = reruns._may_be_checkpointed  # asked by each training forward of a neuron that is not compiled
        monkeypatch.setattr(reruns, "_may_be_checkpointed", lambda: eager.append(1) or looked())
        x = torch.randn(4, 2, 3)

        def compiled_frames(backend):
            torch._dynamo.reset()
            counters.clear()
            model, eager[:] = make(), []
            compiled = torch.compile(model, backend=backend)
            for _ in range(3):
                compiled(x).sum().backward()
            return counters["frames"]["ok"]

        assert compiled_frames("aot_eager") < 20  # plain Dynamo gives up on the ninth
        assert len(eager) == 3 * 12
        assert compiled_frames(Backend(inner="aot_eager")) > 20
        assert not eager

    def test_layers_that_are_alike_share_graphs(self):
        """Nothing is tied to a module before half of the limit is used."""
        layers = [MulFreePSN(3) for _ in range(20)]
        for one in layers:
            one.bind(kernel="shifted-add")
        counters.clear()
        model = nn.Sequential(Break(), *layers)
        torch.compile(model, backend=Backend(inner="aot_eager"))(torch.randn(4, 2, 3, requires_grad=True))
        assert counters["stats"]["unique_graphs"] == 1

    def test_outside_of_dynamo_and_in_another_torch(self, monkeypatch, caplog):
        assert count_recompiles_by_module() == ()
        assert not caplog.records
        monkeypatch.setitem(sys.modules, "torch._dynamo.source", None)
        with caplog.at_level("WARNING", "mfpsn_fx"):
            assert count_recompiles_by_module() == ()
        assert "this torch has other internals" in caplog.text


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.sn = MulFreePSN(width)
        self.sn.bind(kernel="fused-cpp")

    def forward(self, x):
        y = self.sn(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        return y + x if y.shape == x.shape else y


class TestStrides:
    def test_inductor_copies_nothing_for_neurons(self, monkeypatch):
        """It lays convolutions out channels last; a neuron takes what comes. For others it does copy."""
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        copied, copy_input = [], ir.ExternKernel.copy_input
        monkeypatch.setattr(
            ir.ExternKernel,
            "copy_input",
            staticmethod(lambda x: copied.append(str(V.graph.current_node.target)) or copy_input(x)),
        )
        model = nn.Sequential(Residual(3, 8), Residual(8, 8), Residual(8, 8)).double()
        x = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64)
        plain = copy.deepcopy(model)
        # what is found in a cache is not lowered again
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            backend = Backend(options={"layout_optimization": True})
            ours = torch.compile(model, backend=backend, fullgraph=True)(x)
            ours.square().sum().backward()
        assert copied
        assert not [target for target in copied if "mfpsn" in target]
        theirs = plain(x)
        theirs.square().sum().backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


class TestIdentity:
    def test_another_choice_is_another_graph_to_the_caches(self, tmp_path, monkeypatch):
        """What Inductor keeps on disk is found again under the same choice, and not under another."""
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        calls = []
        for name in ("one", "two"):
            base = type(mfpsn_fx.kernels.get_kernel("shifted-add").parts)

            def forward(self, *args, name=name, base=base):
                calls.append(name)
                return base.forward(self, *args)

            mfpsn_fx.register_kernel(f"test-{name}", layouts=tuple(Layout), devices=("cpu",))(
                type(f"Test{name}", (base,), {"forward": forward})
            )
        model, x, met = chain("").eval(), torch.randn(6, 5, 4, 4), []
        try:
            for kernel in ("test-one", "test-one", "test-two", "test-one"):
                torch._dynamo.reset()
                counters.clear()
                with torch.no_grad():
                    backend = Backend([PropagateShapes(), BindKernels(kernel)])
                    torch.compile(model, backend=backend, fullgraph=True)(x)
                met.append((counters["aot_autograd"]["autograd_cache_hit"], calls.pop()))
                assert not calls
        finally:
            for name in ("one", "two"):
                mfpsn_fx.kernels.unregister_kernel(f"test-{name}")
        assert met == [(0, "one"), (1, "one"), (0, "two"), (1, "one")]

    def test_equal_backends_share_graphs_and_others_do_not(self):
        first, second = Recorder(), Recorder()
        assert Backend(inner=first) == Backend(inner=first)
        assert hash(Backend(options={"max_autotune": True})) == hash(Backend(options={"max_autotune": True}))
        assert Backend(options={"max_autotune": True}) != Backend()
        assert Backend(inner=first) != Backend(inner=first, replan=True)
        model, x = chain("shifted-add"), torch.randn(6, 5, 4, 4)
        for inner, times in ((first, 2), (second, 2)):
            for _ in range(times):
                torch.compile(model, backend=Backend(inner=inner))(x)
        assert (len(first.graphs), len(second.graphs)) == (1, 1)


class TestSettings:
    def test_found_by_name_without_import(self):
        code = (
            "import sys, torch\n"
            "compiled = torch.compile(torch.nn.Linear(3, 2), backend='mfpsn_fx')\n"
            "assert compiled(torch.randn(4, 3)).shape == (4, 2)\n"
            "assert 'mfpsn_fx' in sys.modules and 'mfpsn_fx.backend' in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

    def test_mode_and_options_reach_inductor(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "torch._inductor.compile_fx.compile_fx",
            lambda gm, inputs, config_patches: seen.append(config_patches) or gm,
        )
        model, x = chain("shifted-add"), torch.randn(6, 5, 4, 4)
        torch.compile(model, backend=Backend(mode="max-autotune-no-cudagraphs"))(x)
        torch.compile(model, backend=Backend(options={"max-autotune": True}))(x)
        torch.compile(model, backend="mfpsn_fx", options={"max_autotune": False})(x)
        torch.compile(model, backend="mfpsn_fx")(x)
        assert [s.get("max_autotune") for s in seen] == [True, True, False, None]
        # and what is better for neurons on a CPU, unless the user knows better
        assert [s.get("layout_optimization") for s in seen] == [False] * 4
        torch.compile(model, backend=Backend(options={"layout_optimization": True}))(x)
        torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="mfpsn_fx")(x)
        assert [s.get("layout_optimization") for s in seen[4:]] == [True, None]

    def test_options_of_another_compiler(self):
        seen = []
        inner = lambda gm, inputs, **given: seen.append(given) or gm  # noqa: E731
        torch.compile(chain("shifted-add"), backend=Backend(inner=inner, options={"a": 1}))(torch.randn(6, 5, 4, 4))
        torch.compile(chain("shifted-add"), backend=Backend(inner=inner))(torch.randn(6, 5, 4, 4))
        assert seen == [{"options": {"a": 1}}, {}]

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"inner": "indoctor"}, ValueError, r"no inner compiler 'indoctor'; there are .*inductor"),
            ({"inner": "mfpsn_fx"}, ValueError, "no inner compiler 'mfpsn_fx'"),
            ({"inner": 3}, TypeError, "inner must be a backend's name or a callable, found int"),
            ({"passes": 3}, TypeError, "passes must be a Pipeline or passes in order, found 3"),
            ({"passes": [PlanLayout()]}, mfpsn_fx.PipelineError, "needs 'shapes'"),
            ({"mode": "fast"}, ValueError, "fast"),
            ({"mode": "reduce-overhead", "options": {"max_autotune": True}}, ValueError, "mode or options, not both"),
            ({"options": {"max_autotoon": True}}, ValueError, r"no options \['max_autotoon'\]"),
        ],
    )
    def test_faults(self, settings, error, message):
        with pytest.raises(error, match=message):
            Backend(**settings)
