"""Passes one by one, and the pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx import MulFreePSN, Pass, Pipeline, PipelineError, conversion_pipeline, planning_pipeline
from mfpsn_fx.kernels import get_kernel, power_of_two, to_layout
from mfpsn_fx.model import capture
from mfpsn_fx.model.results import record_of
from mfpsn_fx.passes import (
    AssignDilations,
    Autoselect,
    BindKernels,
    CancelConversions,
    ConvertOptions,
    Example,
    InitializeNeurons,
    InsertConversions,
    ObserveInputs,
    PassContext,
    PropagateShapes,
    ReplaceNeurons,
    Result,
    SnapWeights,
    conversion_nodes,
    neurons,
    receptive_field,
)


def on(*args, **options):
    """What passes need to run on a batch, quickly."""
    return PassContext(Example(args), ConvertOptions(repeats=1, progress=False, **options))


@pytest.fixture
def gm(net):
    return capture(copy.deepcopy(net))[0]


class TestOneByOne:
    def test_graph_runs_after_every_pass(self, gm, example):
        """Unbound is legal: runnable and differentiable after each pass."""
        context = on(example)
        for one in conversion_pipeline():
            result = one(gm, context)
            gm = result.graph_module
            out = gm(example)
            out.sum().backward()
            assert out.shape == (5, 3), one.name
            for name, parameter in gm.named_parameters():
                assert parameter.grad is not None, (one.name, name)
                assert parameter.grad.isfinite().all(), (one.name, name)
            gm.zero_grad()
            for module in gm.modules():
                if isinstance(module, neuron.LIFNode):
                    module.reset()

    def test_passes_tell_what_they_changed(self, gm, example):
        context = on(example)
        changes = {one.name: one(gm, context).changes for one in conversion_pipeline()}
        assert changes["replace_neurons"][0].startswith("features.2: LIFNode -> MulFreePSN(4, order=2")
        assert changes["assign_dilations"] == ("features.4: dilation 1 -> 2", "features.7: dilation 1 -> 3")
        assert "100%" not in changes["initialize_neurons"][0]
        assert changes["observe_inputs"] == (
            "features.2: (6, 5, 4, 8)",
            "features.4: (6, 5, 4, 8)",
            "features.7: (6, 5, 6)",
        )

    def test_any_order_where_needs_are_met(self, gm, example):
        Pipeline([ReplaceNeurons(), BindKernels("vanilla-conv1d"), AssignDilations(2), AssignDilations(3)])(gm)
        assert [n.dilation for n in neurons(gm)] == [3, 3, 3]
        gm(example)

    @pytest.mark.parametrize(
        ("dilation", "expected"),
        [("sawtooth", [1, 2, 3]), (4, [4, 4, 4]), ([2, 5], [2, 5, 2]), ([1, 2, 3, 4], [1, 2, 3])],
    )
    def test_dilations(self, gm, dilation, expected):
        Pipeline([ReplaceNeurons(order=3), AssignDilations(dilation)])(gm)
        assert [n.dilation for n in neurons(gm)] == expected
        assert receptive_field(gm) == 1 + 2 * sum(expected)

    def test_sawtooth_period(self, gm):
        Pipeline([ReplaceNeurons(), AssignDilations("sawtooth", period=2)])(gm)
        assert [n.dilation for n in neurons(gm)] == [1, 2, 1]

    def test_shapes(self, gm, example):
        Pipeline([ReplaceNeurons(), PropagateShapes()])(gm, on(example))
        assert [n.meta[0] for n in neurons(gm)] == [(6, 5, 4, 8), (6, 5, 4, 8), (6, 5, 6)]
        with pytest.raises(ValueError, match="no example was given"):
            PropagateShapes()(capture(nn.Sequential(MulFreePSN(2)))[0])


class TestConversions:
    def test_dataflow_is_unchanged_and_conversions_are_shared(self, example):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (MulFreePSN(3) for _ in range(3))
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                y = self.a(x)
                return self.linear(self.b(y) + self.c(torch.relu(y)) + x) + y

        x = torch.randn(5, 2, 3, 4)
        gm, _ = capture(Skip().eval())
        expected = gm(x)
        pipeline = Pipeline([PropagateShapes(), InsertConversions("time_last")], given=["neurons"])
        pipeline(gm, on(x))
        assert torch.equal(gm(x), expected)
        # x once for three readers, and the end; the linear layer runs time-last
        assert len(conversion_nodes(gm)) == 2
        assert [str(n.layout) for n in neurons(gm)] == ["time_last"] * 3
        again = InsertConversions("time_last")(gm)
        assert torch.equal(again.graph_module(x), expected)
        assert len(conversion_nodes(gm)) == 2
        InsertConversions("time_first")(gm)
        assert conversion_nodes(gm) == []
        assert torch.equal(gm(x), expected)

    def test_in_place_addition_is_kept_in_place(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.a, self.b = nn.Linear(4, 4), MulFreePSN(3), MulFreePSN(3)

            def forward(self, x):
                out, identity = self.a(self.linear(x)), self.linear(x)
                out += identity
                out = self.b(out)
                identity += out
                return out + identity

        x = torch.randn(5, 2, 3, 4)
        model = InPlace().eval()
        gm, _ = capture(model)
        with torch.no_grad():
            expected = model(x)
            Pipeline([PropagateShapes(), InsertConversions("time_last")], given=["neurons"])(gm, on(x))
            assert torch.equal(gm(x), expected)

    def test_masks_and_parameters_of_full_shape(self):
        """A mask stays (T, N) for a time-last neuron; a tensor of the sequence's shape is converted like one."""

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = MulFreePSN(3), MulFreePSN(3)
                self.offset = nn.Parameter(torch.randn(5, 2, 3, 4))

            def forward(self, x, mask):
                return self.b(self.a(x, mask) + self.offset, mask=mask)

        x, mask = torch.randn(5, 2, 3, 4), torch.rand(5, 2) < 0.6
        model = Masked().eval()
        for sn in (model.a, model.b):
            nn.init.zeros_(sn.beta)
        gm, _ = capture(model)
        expected = gm(x, mask)
        assert 0 < expected.sum() < expected.numel()
        Pipeline([PropagateShapes(), InsertConversions("time_last")], given=["neurons"])(gm, on(x, mask))
        assert torch.equal(gm(x, mask), expected)
        assert [str(n.layout) for n in neurons(gm)] == ["time_last"] * 2
        assert len(conversion_nodes(gm)) == 3

    def test_cancel(self):
        gm = torch.fx.symbolic_trace(
            lambda x: to_layout(
                to_layout(to_layout(x + 1, "time_first", "time_last"), "time_last", "time_first"),
                "time_first",
                "time_last",
            )
        )
        assert len(conversion_nodes(gm)) == 3
        result = CancelConversions()(gm)
        assert result.modified
        assert len(conversion_nodes(gm)) == 1
        x = torch.randn(2, 3, 4)
        assert torch.equal(gm(x), to_layout(x + 1, "time_first", "time_last"))
        assert not CancelConversions()(gm).modified


class TestAutoselect:
    def test_every_layer_kernel_and_layout_is_tried(self, gm, example):
        gm = conversion_pipeline(repeats=1, progress=False)(gm, PassContext(Example((example,))))
        for n in neurons(gm):
            tried = {(c.layout, c.kernel) for c in record_of(gm).measured[n.name].candidates}
            assert len(tried) == 2 * len(mfpsn_fx.kernels.kernels())
            working = [c for c in record_of(gm).measured[n.name].candidates if c.error is None and c.layout == n.layout]
            # of those that are not slower than the fastest by more than their spread, the one of highest rank
            for kernel, cost, spread in (
                (n.kernel, lambda c: c.training_ms, lambda c: c.spread_ms),
                (n.eval_kernel, lambda c: c.eval_ms, lambda c: c.eval_spread_ms),
            ):
                able = [c for c in working if cost(c) is not None]
                best = min(map(cost, able))
                close = [c.kernel for c in able if cost(c) - best <= spread(c)]
                assert kernel == max(close, key=lambda name: get_kernel(name).rank)

    def test_the_smaller_total_wins(self, gm, example, distorted):
        """With costs that favor it, time-last is chosen, conversions counted."""

        def fake(problem, name):
            return [1.0] * 3 if problem.layout == "time_last" and name == "conv2d" else [50.0] * 3

        distorted(fake, conversion=5.0)
        gm = conversion_pipeline()(gm, on(example))
        table = mfpsn_fx.selection(gm)
        assert {(r.layout, r.kernel) for r in table.rows} == {("time_last", "conv2d")}
        # six layers and the mean over time; of conversions the example's alone, which has no gradient
        assert dict(table.neuron_totals_ms) == {"time_first": 300.0, "time_last": 6.0, "plan": 6.0}
        assert dict(table.totals_ms) == {"time_first": 300.0 + 35, "time_last": 6.0 + 35 + 5, "plan": 6.0 + 35 + 5}
        assert dict(table.conversion_totals_ms) == {"time_first": 0.0, "time_last": 5.0, "plan": 5.0}
        assert (table.layout, table.conversions, table.conversion_bytes) == ("time_last", 1, 4 * example.numel())
        assert {r.ratio for r in table.rows} == {50.0}
        distorted(fake, conversion=500.0)
        planning_pipeline()(gm, on(example))
        assert {r.layout for r in mfpsn_fx.selection(gm).rows} == {"time_first"}

    def test_identical_layers_are_measured_once(self):
        counts = []
        for layers in (1, 3):
            model = nn.Sequential(*(neuron.LIFNode(step_mode="m") for _ in range(layers)))
            model = mfpsn_fx.convert(model, torch.randn(4, 2, 3), dilation=1, repeats=1, progress=False, cache=False)
            counts.append(mfpsn_fx.selection(model).measured)
        assert counts[0] == counts[1] > 0

    def test_all_fail(self, gm, example, monkeypatch):
        from mfpsn_fx.kernels.autotune.buffers import Pool

        def broken(*args, **kwargs):
            raise MemoryError("too big")

        monkeypatch.setattr(Pool, "windows", broken)
        with pytest.raises(
            ValueError, match=r"(?s)features\.2: no kernel can serve.*shifted-add.*MemoryError: too big"
        ):
            conversion_pipeline()(gm, on(example))


class TestSnap:
    def converted(self, net, example):
        converted = mfpsn_fx.convert(net, example, init="random", repeats=1, progress=False)
        for _ in range(3):
            converted(example)
        return converted.eval()

    def test_weights_fold_to_powers_of_two_and_spikes_stay(self, net, example):
        converted = self.converted(net, example).double()
        expected = converted(example.double())
        result = SnapWeights()(converted)
        assert len(result.changes) == 3
        assert "weights moved by up to" in result.changes[0]
        for n in neurons(converted):
            fused = n.module.folded().unquantized
            torch.testing.assert_close(fused, power_of_two(fused), rtol=1e-14, atol=0)
        assert torch.equal(converted(example.double()), expected)

    def test_gamma_of_zero_and_nan_are_refused_together(self, net, example):
        converted = self.converted(net, example)
        with torch.no_grad():
            converted.get_submodule("features.2").gamma[1] = 0
            converted.get_submodule("features.4").weight[0] = float("nan")
        with pytest.raises(ValueError, match=r"(?s)features\.2: gamma is 0 in 1 of 4 channels.*features\.4: 2 of 8"):
            SnapWeights()(converted)


class TestPipeline:
    def test_all_violations_in_one_error(self):
        with pytest.raises(PipelineError) as error:
            Pipeline([AssignDilations(), Autoselect(), ReplaceNeurons(), InitializeNeurons()])
        text = str(error.value)
        assert (
            "0: assign_dilations needs 'neurons', which nothing before it gives; move it after replace_neurons" in text
        )
        assert "1: autoselect needs 'shapes', which nothing before it gives; no pass in the pipeline gives it" in text
        assert len(text.splitlines()) == 4

    def test_printed_taken_apart_and_extended(self, example):
        pipeline = conversion_pipeline()
        text = str(pipeline)
        for one in pipeline:
            assert one.name in text
        names = [p.name for p in pipeline]
        assert names[:2] == ["check_sources", "observe_inputs"]
        assert [p.name for p in pipeline.without("verify_plan")] == [n for n in names if n != "verify_plan"]
        longer = pipeline.inserted(SnapWeights(), after="initialize_neurons")
        assert longer[6].name == "snap_weights"
        assert pipeline.inserted(SnapWeights())[-1].name == "snap_weights"
        assert pipeline.inserted(SnapWeights(), before="autoselect")[9].name == "snap_weights"
        assert pipeline.replaced("assign_dilations", AssignDilations(7))[4].overrides == {"dilation": 7}
        assert len(pipeline) == len(names)
        with pytest.raises(ValueError, match="no pass called 'x'"):
            pipeline.without("x")
        with pytest.raises(ValueError, match="not both"):
            pipeline.inserted(SnapWeights(), before="autoselect", after="autoselect")

    def test_a_users_pass(self, gm, example):
        class Scale(Pass):
            """Multiply all γ by two."""

            name = "scale"
            needs = ("neurons",)

            def call(self, gm, context):
                for n in neurons(gm):
                    n.module.gamma.data.mul_(2)
                return Result(gm, ["doubled"])

        gm = Pipeline([ReplaceNeurons(), Scale()])(gm)
        assert all((n.module.gamma == 2).all() for n in neurons(gm))

        def plain(gm):
            return None

        Pipeline([plain], given=["neurons"])(gm)(example)

    def test_debug_folder(self, net, example, tmp_path, monkeypatch):
        monkeypatch.setenv("MFPSN_FX_DEBUG", str(tmp_path / "debug"))
        mfpsn_fx.convert(net, example, repeats=1, progress=False)
        files = sorted(p.name for p in (tmp_path / "debug").iterdir())
        assert "03_replace_neurons.before.txt" in files
        assert "LIFNode" in (tmp_path / "debug" / "03_replace_neurons.before.txt").read_text()
        assert "MulFreePSN" in (tmp_path / "debug" / "03_replace_neurons.after.txt").read_text()
        text = (tmp_path / "debug" / "04_assign_dilations.changes.txt").read_text()
        assert text.startswith("time: ")
        assert "features.4: dilation 1 -> 2" in text
        assert len(files) == 3 * len(conversion_pipeline())


def test_observe_inputs_without_an_example_does_nothing(gm):
    assert not ObserveInputs()(gm).modified
