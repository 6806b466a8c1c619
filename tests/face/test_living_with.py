"""What researchers do with a converted network: masks, optimizers, monitors, checkpoints, mixed precision."""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mfpsn_fx
from mfpsn_fx import Batch, MaskedBatchNorm, MulFreePSN

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


def quick(model, *example, **options):
    options = {"kernels": "shifted-add", "layout": "time_first", **options}
    return mfpsn_fx.convert(model, *example, repeats=1, progress=False, **options)


class SpeechNet(nn.Module):
    """(T, N, 5) → (N, 3), a readout that knows of padding."""

    def __init__(self, norm: bool = True, traced: bool = True) -> None:
        super().__init__()
        self.traced = traced
        self.fc1 = layer.Linear(5, 8, step_mode="m")
        self.norm = _Norm(8) if norm else nn.Identity()
        self.lif1 = neuron.LIFNode(v_threshold=0.3, step_mode="m")
        self.fc2 = layer.Linear(8, 6, step_mode="m")
        self.lif2 = neuron.LIFNode(v_threshold=0.3, step_mode="m")
        self.head = layer.Linear(6, 3, step_mode="m")
        with torch.no_grad():  # so that its neurons have something to do
            self.fc1.weight.mul_(3)
            self.fc2.weight.mul_(3)

    def forward(self, x):
        if not self.traced and x.max() > 1e9:  # makes the network a leaf
            return x
        x = self.lif1(self.norm(self.fc1(x)))
        return mfpsn_fx.masked_mean(self.head(self.lif2(self.fc2(x))))


class _Norm(nn.Module):
    """A batch norm over T·N, the time axis folded by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view_as(x)


def sequences(steps=7, batch=6):
    """Inputs with junk in the padding, twice, and their mask."""
    mask = mfpsn_fx.lengths_to_mask(torch.tensor([7, 3, 5, 1, 6, 2])[:batch], steps)
    x = torch.randn(steps, batch, 5)
    junk = [x.masked_fill(~mask[..., None], value) for value in (0.0, 1e3)]
    return junk, mask


def learn(model, x):
    """Output, gradients and the state after one step of training."""
    model.train().zero_grad()
    out = model(x)
    F.cross_entropy(out, torch.arange(out.shape[0]) % 3).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


class TestVariableLengths:
    def test_lengths(self):
        mask = mfpsn_fx.lengths_to_mask(torch.tensor([2, 0, 3]))
        assert mask.tolist() == [[True, False, True], [True, False, True], [False, False, True]]
        assert mfpsn_fx.lengths_to_mask(torch.tensor([2]), 4).shape == (4, 1)
        for wrong, message in (
            (torch.tensor([5]), r"must lie in 0 … 4 steps, found 5 … 5"),
            (torch.tensor([-1, 2]), r"found -1 … 2"),
            (torch.tensor([1.0]), r"integers of shape \(N,\), found torch.float32"),
            (torch.tensor([[1]]), r"found torch.int64 of shape \(1, 1\)"),
        ):
            with pytest.raises(ValueError, match=message):
                mfpsn_fx.lengths_to_mask(wrong, 4)

    def test_masked_mean(self):
        (x, junk), mask = sequences()
        wanted = torch.stack([x[: int(mask[:, n].sum()), n].mean(0) for n in range(x.shape[1])])
        torch.testing.assert_close(mfpsn_fx.masked_mean(junk, mask), wanted)
        with mfpsn_fx.valid_steps(mask):
            torch.testing.assert_close(mfpsn_fx.masked_mean(junk), wanted)
        assert torch.equal(mfpsn_fx.masked_mean(x), x.mean(0))
        assert mfpsn_fx.masked_mean(junk, torch.zeros_like(mask)).abs().sum() == 0
        with pytest.raises(ValueError, match=r"bool of shape \(T, N\) = \(7, 6\), found torch.bool of shape \(6, 7\)"):
            mfpsn_fx.masked_mean(x, mask.t())

    @pytest.mark.parametrize("layout", ["time_first", "time_last"])
    @pytest.mark.parametrize("traced", [True, False])
    def test_padding_of_any_content_changes_nothing(self, traced, layout):
        (clean, junk), mask = sequences()
        if layout == "time_last" and not traced:
            layout = "time_first"  # inside a leaf
        with mfpsn_fx.valid_steps(mask):
            model = quick(SpeechNet(traced=traced), clean, layout=layout)
        assert any(n.name == "model.lif1" for n in mfpsn_fx.passes.neurons(model)) is not traced
        twin = copy.deepcopy(model)
        assert mfpsn_fx.mask_batch_norms(model) == mfpsn_fx.mask_batch_norms(twin) == 1
        for _ in range(2):
            with mfpsn_fx.valid_steps(mask):
                for a, b in zip(learn(model, clean), learn(twin, junk), strict=True):
                    assert torch.equal(a, b)
        with mfpsn_fx.valid_steps(mask), torch.no_grad(), mfpsn_fx.monitor(model) as seen:
            assert torch.equal(model.eval()(clean), twin.eval()(junk))
        assert all(0.02 < found.rate < 0.9 for found in seen.layers().values())
        torch.manual_seed(1)
        assert not torch.equal(model(clean), twin(junk))  # without the mask

    def test_a_padded_batch_is_its_sequences(self):
        """In evaluation each sequence gives what it gives alone, unpadded."""
        (clean, junk), mask = sequences()
        model = quick(SpeechNet(), clean).eval()
        with mfpsn_fx.valid_steps(mask):
            out = model(junk)
        for n in range(clean.shape[1]):
            torch.testing.assert_close(out[n], model(clean[: int(mask[:, n].sum()), n : n + 1])[0])

    def test_compiled(self):
        """No break; another mask compiles nothing anew."""
        (clean, junk), mask = sequences()
        model = quick(SpeechNet(norm=False), clean)
        twin = copy.deepcopy(model)
        graphs = []

        def count(gm, inputs):
            graphs.append(gm)
            return gm

        compiled = torch.compile(twin, backend=count, fullgraph=True)
        for mask in (mask, mask.flip(1).contiguous()):  # noqa: B020
            with mfpsn_fx.valid_steps(mask):
                for a, b in zip(learn(model, clean), learn(compiled, clean), strict=True):
                    torch.testing.assert_close(a, b)
        assert len(graphs) == 1
        model, compiled = model.train(), compiled.train()
        assert not torch.equal(model(junk), model(clean))
        torch.testing.assert_close(compiled(clean), model(clean))
        assert len(graphs) == 2

    def test_contexts_nest_and_end(self):
        (x, _), mask = sequences()
        sn = MulFreePSN(5).eval()
        with torch.no_grad():
            sn.beta.fill_(3.0)  # fires always
        with mfpsn_fx.valid_steps(mask):
            assert torch.equal(sn(x)[..., 0].bool(), mask)
            with mfpsn_fx.valid_steps(~mask):
                assert torch.equal(sn(x)[..., 0].bool(), ~mask)
                assert torch.equal(sn(x, mask)[..., 0].bool(), mask)
            assert torch.equal(sn(x)[..., 0].bool(), mask)
        with pytest.raises(KeyError), mfpsn_fx.valid_steps(mask):
            raise KeyError
        assert bool(sn(x).all())

    def test_wrong_masks(self):
        (x, _), mask = sequences()
        sn = MulFreePSN(5)
        for wrong, found in ((mask.float(), "torch.float32"), (mask[0], r"shape \(6,\)"), (None, "NoneType")):
            with pytest.raises(ValueError, match=rf"bool tensor of shape \(T, N\).*found .*{found}"):
                mfpsn_fx.valid_steps(wrong).__enter__()
        with mfpsn_fx.valid_steps(mask.t()), pytest.raises(ValueError, match=r"bool of shape \(T, N\) = \(7, 6\)"):
            sn(x)

    def test_masked_batch_norm_is_torchs(self):
        """Without a mask, and with one on the valid steps alone."""
        (clean, junk), mask = sequences()
        for make in (lambda: nn.BatchNorm1d(5), lambda: layer.BatchNorm1d(5, step_mode="m"),
                     lambda: nn.BatchNorm1d(5, momentum=None, affine=False)):  # fmt: skip
            theirs = make()
            ours = MaskedBatchNorm(copy.deepcopy(theirs))
            assert set(ours.state_dict()) == set(theirs.state_dict())
            fold = (lambda t: t) if ours.time_first else (lambda t: t.flatten(0, 1))
            for _ in range(2):
                torch.testing.assert_close(ours(fold(clean)), theirs(fold(clean)))
            plain = MaskedBatchNorm(copy.deepcopy(theirs))
            plain.time_first = False
            theirs = copy.deepcopy(plain)
            with mfpsn_fx.valid_steps(mask):
                found = ours(fold(junk)).reshape(7, 6, 5)[mask]
            torch.testing.assert_close(found, theirs(clean[mask]))
            for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b)
            with mfpsn_fx.valid_steps(mask):
                torch.testing.assert_close(
                    ours.eval()(fold(clean)), theirs.eval()(clean.flatten(0, 1)).view_as(fold(clean))
                )
        with mfpsn_fx.valid_steps(mask), pytest.raises(ValueError, match="needs an input of 42 rows"):
            plain.train()(clean[0])

    def test_norms_that_are_not_known(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
        with pytest.raises(TypeError, match=r"1: torch\..*SyncBatchNorm is not a batch norm that can be masked"):
            mfpsn_fx.mask_batch_norms(model)
        assert type(model[0]) is nn.BatchNorm1d


class TestOptimizers:
    def test_groups(self, net, example):
        net.features[4] = neuron.EIFNode(step_mode="m")
        model = quick(net, example, strict=False)
        decayed, spared = mfpsn_fx.param_groups(model, 0.1)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in decayed["params"]} == {
            "features.0.weight", "features.3.weight", "features.6.weight", "head.weight",
        }  # fmt: skip
        assert len(decayed["params"]) + len(spared["params"]) == len(names)
        optimizer = torch.optim.AdamW([decayed, spared], lr=0.1)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {names[id(p)] for p in decayed["params"]}

    def test_groups_of_others(self, net, example):
        net.features[4] = neuron.PSN(T=6)
        (decayed, _) = mfpsn_fx.param_groups(net, 0.1)
        assert not any(p is net.features[4].weight for p in decayed["params"])
        compiled = torch.compile(quick(net, example))
        assert len(mfpsn_fx.param_groups(compiled, 0.1)[0]["params"]) == 4
        for wrong in (-0.1, "a", True, float("nan")):
            with pytest.raises(ValueError, match="weight_decay must be a number of at least 0"):
                mfpsn_fx.param_groups(net, wrong)

    def test_an_optimizer_from_before(self, net, example):
        early = torch.optim.SGD(net.parameters(), lr=0.1)
        model = quick(net, example)
        total = len(list(model.parameters()))
        held = len(list(net.parameters()))
        with pytest.raises(
            ValueError, match=rf"(?s)lacks {total} of {total} .*features\.0\.weight.*and holds {held} .*before convert"
        ):
            mfpsn_fx.check_optimizer(early, model)
        mfpsn_fx.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model.head.requires_grad_(False)
        mfpsn_fx.check_optimizer(torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1), model)
        # in place the synapses are shared, and only the neurons are missing
        model = quick(net, example, inplace=True)
        with pytest.raises(ValueError, match=r"lacks 9 of \d+ parameters of the model \(features\.2\.weight"):
            mfpsn_fx.check_optimizer(early, model)


class TestMonitor:
    @pytest.mark.parametrize("layout", ["time_first", "time_last"])
    def test_rates(self, net, example, layout):
        model = quick(net.eval(), example, layout=layout)
        second = model.get_submodule("features.4")
        with torch.no_grad():
            second.beta[0], second.beta[1] = -1e4, 1e4
        fired = {}
        handles = [
            m.register_forward_hook(lambda m, a, out: fired.setdefault(m.path, []).append(out))
            for m in model.modules()
            if isinstance(m, MulFreePSN)
        ]
        with mfpsn_fx.monitor(model) as seen:
            model(example)
            model(example * 2)
        for handle in handles:
            handle.remove()
        assert not any(m._forward_hooks for m in model.modules())
        model(example)
        dims = (0, 1, 3) if layout == "time_first" else (0, 2, 3)
        wanted = torch.cat(fired["features.4"], 1 if layout == "time_first" else 0).mean(dims)
        torch.testing.assert_close(seen.rates()["features.4"], wanted)
        found = seen.layers()["features.4"]
        assert bool(found.silent[0])
        assert found.saturated.tolist()[:2] == [False, True]
        assert found.steps == 2 * 6 * 5
        scalars = seen.scalars("train/")
        assert scalars["train/features.4/rate"] == pytest.approx(float(wanted.detach().mean()))
        assert scalars["train/features.4/saturated"] >= 0.25
        assert set(scalars) == {f"train/features.{i}/{w}" for i in (2, 4, 7) for w in ("rate", "silent", "saturated")}
        text = str(seen)
        assert "features.7" in text
        assert "saturated" in text
        assert seen.table("github").startswith("|")
        seen.reset()
        assert seen.layers() == {}
        assert "not called" in str(seen)

    def test_leaves_masks_and_gradients(self):
        (x, _), mask = sequences()
        model = quick(SpeechNet(traced=False), x)
        seen = mfpsn_fx.monitor(model, silent=0.5)
        with mfpsn_fx.valid_steps(mask):
            model(x).sum().backward()
        seen.close()
        seen.close()
        found = seen.layers()["model.lif1"]
        assert found.steps == int(mask.sum())
        assert torch.equal(found.silent, found.rates <= 0.5)
        assert not found.rates.requires_grad

    def test_refused(self, net, example):
        with pytest.raises(TypeError, match="LifNet has no MulFreePSN neuron to monitor"):
            mfpsn_fx.monitor(net)
        with pytest.raises(TypeError, match="a compiled network ignores hooks"):
            mfpsn_fx.monitor(torch.compile(quick(net, example)))


class TestStatistics:
    def test_cumulative_average(self, net, example):
        net.features.insert(2, nn.Dropout(0.5))
        model = quick(net.train(), example)
        model.get_submodule("features.2").eval()
        modes = {n: m.training for n, m in model.named_modules()}
        xs = [torch.randn(6, 5, 1, 8) + 1 for _ in range(3)]
        sn, bn = model.get_submodule("features.3"), model.get_submodule("features.1")
        assert mfpsn_fx.recompute_statistics(model, iter(xs)) == 3
        assert {n: m.training for n, m in model.named_modules()} == modes
        assert (sn.momentum, bn.momentum) == (0.1, 0.1)
        conv, weights = model.get_submodule("features.0"), []
        for x in xs:
            y = conv(x)
            mean, var = y.mean((0, 1, 3)), y.var((0, 1, 3), correction=0)
            z = (y - mean[:, None]) / torch.sqrt(var[:, None] + 1e-5)
            h = mfpsn_fx.passes.fit_taps.filtered(z, sn.weight.detach(), sn.dilation)
            weights.append((mean, y.var((0, 1, 3)), h.mean((0, 1, 3)), h.var((0, 1, 3))))
        for name, wanted in zip(
            ("features.1.running_mean", "features.1.running_var", "features.3.running_mean", "features.3.running_var"),
            zip(*weights, strict=True), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(model.get_buffer(name), torch.stack(wanted).mean(0), rtol=1e-4, atol=1e-5)
        assert bn.num_batches_tracked == 3

    def test_failures_leave_everything_as_it_was(self, net, example):
        model = quick(net, example)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="given no batch"):
            mfpsn_fx.recompute_statistics(model, [])
        with pytest.raises(TypeError, match="a batch must be a tensor"):
            mfpsn_fx.recompute_statistics(model, [example, 3])
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert all(m.training for m in model.modules())
        with pytest.raises(ValueError, match="Linear has no neuron and no batch norm"):
            mfpsn_fx.recompute_statistics(nn.Linear(2, 2), [example])

    def test_masks(self):
        (clean, junk), mask = sequences()
        states = []
        model = quick(SpeechNet(), clean)
        mfpsn_fx.mask_batch_norms(model)
        for x in (clean, junk):
            mfpsn_fx.recompute_statistics(model, [Batch(x, mask=mask)])
            states.append([b.clone() for b in model.buffers()])
        for a, b in zip(*states, strict=True):
            assert torch.equal(a, b)


class TestSourceCheckpoint:
    def test_synapses_by_name_and_neurons_from_the_start(self, net, example):
        trained = copy.deepcopy(net)
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(torch.randn_like(p))
        trained.features[1].running_mean.add_(0.3)
        model = quick(net.eval(), example)
        with torch.no_grad():
            model.get_submodule("features.2").weight.add_(5)
        mfpsn_fx.load_source_checkpoint(model, trained.state_dict(), example)
        wanted = quick(trained.eval(), example)
        for (key, a), b in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=key)

    def test_without_an_example_it_evaluates_alike(self, net, example):
        trained = copy.deepcopy(net).eval()
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(torch.randn_like(p))
        model = quick(net.eval(), example)
        mfpsn_fx.load_source_checkpoint(model, trained.state_dict())
        torch.testing.assert_close(model(example), quick(trained, example)(example))

    def test_what_neurons_learned(self, net, example):
        net.features[4] = neuron.ParametricLIFNode(step_mode="m")
        trained = copy.deepcopy(net)
        with torch.no_grad():
            trained.features[4].w.fill_(1.3)
        model = quick(net.eval(), example)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"parameters of 1 neurons \(features\.4\.w\): give source="):
            mfpsn_fx.load_source_checkpoint(model, trained.state_dict(), example)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        mfpsn_fx.load_source_checkpoint(model, trained.state_dict(), example, source=net)
        assert net.features[4].w != 1.3
        wanted = quick(trained.eval(), example)
        for (key, a), b in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
        with pytest.raises(ValueError, match="does not fit the Sequential given as source"):
            mfpsn_fx.load_source_checkpoint(model, trained.state_dict(), source=nn.Sequential(nn.Linear(2, 2)))

    def test_a_network_that_is_one_leaf(self):
        x = torch.randn(4, 3, 5)
        net = SpeechNet(traced=False).eval()
        trained = copy.deepcopy(net)
        nn.init.normal_(trained.fc1.weight)
        model = quick(net, x)
        mfpsn_fx.load_source_checkpoint(model, trained.state_dict(), x)
        assert torch.equal(model.get_parameter("model.fc1.weight"), trained.fc1.weight)
        torch.testing.assert_close(model(x), quick(trained, x)(x))

    def test_what_does_not_fit(self, net, example):
        model = quick(net, example)
        state = dict(net.state_dict())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state["features.9.weight"] = torch.zeros(1)
        state["head.weight"] = torch.zeros(2, 2)
        del state["head.bias"]
        with pytest.raises(ValueError, match=r"(?s)unknown key features\.9\.weight\n  missing key head\.bias\n  "
                           r"head\.weight has shape \(2, 2\), the model's \(3, 6\)"):  # fmt: skip
            mfpsn_fx.load_source_checkpoint(model, state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        with pytest.raises(TypeError, match=r"not a network that mfpsn_fx.convert returned"):
            mfpsn_fx.load_source_checkpoint(net, state)


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_grad_scaler(self, dtype):
        """Trains under autocast with scaled gradients; neurons stay float32, an overflow is skipped."""
        x, y = torch.randn(6, 12, 5), torch.randint(0, 3, (12,))
        model = quick(SpeechNet(), x)
        optimizer = torch.optim.AdamW(mfpsn_fx.param_groups(model, 0.01), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for _ in range(12):
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        for m in model.modules():
            if isinstance(m, MulFreePSN):
                assert {t.dtype for t in (*m.parameters(), *m.buffers())} == {torch.float32}
                assert all(torch.isfinite(p.grad).all() for p in m.parameters())
        before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k}
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(x).float().sum() * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() < scale
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value), key


class TestCheckpointing:
    class Checkpointed(nn.Module):
        def __init__(self, model, reentrant):
            super().__init__()
            self.model, self.reentrant = model, reentrant

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=self.reentrant)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_statistics_are_counted_once(self, reentrant):
        """Gradients and running statistics are those of the plain run, masks included."""
        (x, _), mask = sequences()
        model = quick(SpeechNet(norm=False), x)
        twin = copy.deepcopy(model)
        for mask in (None, mask):  # noqa: B020
            with mfpsn_fx.valid_steps(mask if mask is not None else torch.ones(7, 6, dtype=torch.bool)):
                plain = learn(model, x.clone().requires_grad_())
                wrapped = self.Checkpointed(twin, reentrant)
                with mfpsn_fx.monitor(twin) as seen:
                    again = learn(wrapped, x.clone().requires_grad_())
                assert seen.layers()["lif1"].steps == (42 if mask is None else int(mask.sum()))
            for a, b in zip(plain, again, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_backward_outside_of_the_mask_is_an_error(self, reentrant):
        (x, _), mask = sequences()
        wrapped = self.Checkpointed(quick(SpeechNet(norm=False), x), reentrant)
        with mfpsn_fx.valid_steps(mask):
            out = wrapped(x.requires_grad_())
        with pytest.raises(RuntimeError, match=r"lif1: .* runs again with no mask, and ran under another before"):
            out.sum().backward()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_another_mask_is_an_error(self, reentrant):
        """A second forward before the first one's backward, or a mask where there was none: never another gradient."""
        (x, _), mask = sequences()
        wrapped = self.Checkpointed(quick(SpeechNet(norm=False), x), reentrant)
        x = x.requires_grad_()
        with mfpsn_fx.valid_steps(mask):
            first = wrapped(x)
        with mfpsn_fx.valid_steps(mask.roll(1, 1)):
            second = wrapped(x)
            with pytest.raises(RuntimeError, match=r"lif1: .* runs again with a mask, and ran under several before"):
                (first + second).sum().backward()
        wrapped = copy.deepcopy(wrapped)
        unmasked = wrapped(x)
        with (
            mfpsn_fx.valid_steps(mask),
            pytest.raises(RuntimeError, match=r"lif1: .* runs again with a mask, and ran without one before"),
        ):
            unmasked.sum().backward()

    def test_one_mask_after_the_other(self):
        (x, _), mask = sequences()
        plain = quick(SpeechNet(norm=False), x)
        wrapped = self.Checkpointed(copy.deepcopy(plain), False)
        for model in (plain, wrapped.model):
            mfpsn_fx.recompute_statistics(model, [x])
        for valid in (mask, mask.roll(1, 1), torch.ones_like(mask)):
            with mfpsn_fx.valid_steps(valid):
                expected, found = (learn(model, x.clone().requires_grad_()) for model in (plain, wrapped))
            for a, b in zip(expected, found, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_masked_batch_norms_count_once(self, reentrant):
        x, mask = torch.randn(5, 4, 3, requires_grad=True), torch.ones(5, 4, dtype=torch.bool)
        mask[3:, 1] = False
        norm = nn.Sequential(layer.BatchNorm1d(3, step_mode="m"))
        assert mfpsn_fx.mask_batch_norms(norm) == 1
        twin = copy.deepcopy(norm)
        with mfpsn_fx.valid_steps(mask):
            norm(x).square().sum().backward()
            checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
            out = checkpoint(twin, x, use_reentrant=reentrant)
        for a, b in zip(norm.buffers(), twin.buffers(), strict=True):
            assert not torch.equal(a, b)  # by the second forward
        with pytest.raises(RuntimeError, match="MaskedBatchNorm: its checkpointed forward runs again with no mask"):
            out.sum().backward()
        assert int(twin[0].num_batches_tracked) == 2


def test_a_neuron_called_twice_averages_its_calls():
    neuron = MulFreePSN(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron

        def forward(self, x):
            return self.lif(2 * self.lif(x) + x)

    batches = [torch.randn(6, 8, 3) for _ in range(3)]
    seen = []
    for x in batches:
        probe = copy.deepcopy(neuron)
        probe.momentum = 1.0
        first = probe(x)
        seen.append(probe.running_mean.clone())
        probe(2 * first + x)
        seen.append(probe.running_mean.clone())
    mfpsn_fx.recompute_statistics(Twice(), batches)
    torch.testing.assert_close(neuron.running_mean, torch.stack(seen).mean(0))


def test_a_mask_of_single_values_moves_no_statistics():
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[2, 1] = True
    neuron, norm = MulFreePSN(3), nn.Sequential(layer.BatchNorm1d(3, step_mode="m"))
    mfpsn_fx.mask_batch_norms(norm)
    with mfpsn_fx.valid_steps(mask):
        neuron(torch.randn(5, 4, 3))
        norm(torch.randn(5, 4, 3))
    assert torch.equal(neuron.running_var, torch.ones(3))
    assert torch.equal(norm[0].running_var, torch.ones(3))


def test_batch_norms_with_hooks_are_not_replaced():
    norm = nn.Sequential(nn.BatchNorm1d(3))
    norm[0].register_forward_hook(lambda *a: None)
    with pytest.raises(TypeError, match=r"0: it has hooks or a forward of its own, which its"):
        mfpsn_fx.mask_batch_norms(norm)


def test_compiled_checkpoint():
    """The compiler recomputes values, not calls: statistics are counted once there too."""
    x = torch.randn(7, 6, 5)
    model = quick(SpeechNet(norm=False), x)
    twin = copy.deepcopy(model)
    step = torch.compile(lambda x: checkpoint(twin, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    model(x).sum().backward()
    step(x).sum().backward()
    for a, b in zip([*model.buffers()], [*twin.buffers()], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["living_with.md", "calibration.md"])
def test_what_the_manual_says_to_type(name, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide" / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"docs/guide/{name}", "exec"), names)
    printed = capsys.readouterr().out
    if name == "calibration.md":
        assert "common spikes after" in printed
        for row in mfpsn_fx.calibration(names["model"]).layers.values():
            assert abs(row.rate_after - row.source_rate) < 0.03
        return
    assert "saturated" in printed
    assert names["rates"].shape == (32,)
    assert "train/hidden.2/silent" in names["log"]
    assert len(blocks) == 9


def test_reset_net_after_masking(net, example):
    model = quick(net, example).eval()
    expected = model(example)
    assert mfpsn_fx.mask_batch_norms(model) == 1
    functional.reset_net(model)
    assert torch.equal(model(example), expected)
