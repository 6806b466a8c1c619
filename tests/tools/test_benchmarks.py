"""The benchmarks in small: what they compare computes the same, they write what they say. No time is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import platform
import socket
import subprocess
import sys
import time

import pytest
import torch

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import unregister_kernel
from mfpsn_fx.kernels.build import cpu as cpu_build
from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(script):
    """A benchmark by its name."""
    return lambda name: script(f"benchmarks/{name}.py")


pytestmark = pytest.mark.usefixtures("one_thread")


class TestVanillaModule:
    @pytest.mark.parametrize("kernel", ["vanilla-conv1d", "shifted-add"])
    @pytest.mark.parametrize(("order", "dilation", "rest"), [(1, 1, (4,)), (2, 3, ()), (4, 2, (3, 2)), (8, 1, (5,))])
    def test_it_equals_the_op(self, load, kernel, order, dilation, rest):
        """Outputs, gradients and running statistics in float64, over training steps and then in evaluation."""
        vanilla = load("vanilla").VanillaMulFreePSN(3, order, dilation).double()
        ours = MulFreePSN(3, order, dilation, dtype=torch.float64)
        ours.load_state_dict(vanilla.state_dict())
        ours.bind(kernel=kernel, eval_kernel=kernel)
        for training in (True, True, False):
            x = torch.randn(6, 4, 3, *rest, dtype=torch.float64)
            grad = torch.randn_like(x)
            found = []
            for module in (vanilla, ours):
                module.train(training).zero_grad()
                inner = x.clone().requires_grad_()
                out = module(inner)
                out.backward(grad)
                found.append([out, inner.grad, *(p.grad for p in module.parameters()), *module.buffers()])
            assert found[0][0].is_contiguous()
            assert 0 < found[0][0].mean() < 1
            assert torch.equal(found[0][0], found[1][0])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_it_has_the_parameters_of_ours(self, load):
        vanilla, ours = load("vanilla").VanillaMulFreePSN(5, 3), MulFreePSN(5, 3)
        shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (vanilla, ours)]
        assert shapes[0] == shapes[1]


class TestTimer:
    def test_rounds_are_at_least_those_asked_for(self, load):
        common, calls = load("runner"), {"a": 0, "b": 0}

        def count(name):
            calls[name] += 1

        found = common.interleave({n: lambda n=n: count(n) for n in calls}, torch.device("cpu"), 0.0, least=4)
        assert found.rounds == 4
        assert calls == {"a": 6, "b": 6}  # two calls to warm up
        assert set(found.ms) == {"a", "b"}
        assert common.interleave({"a": int}, torch.device("cpu"), 60.0, most=9).rounds == 9

    def test_one_that_raises_is_left_out_with_its_reason(self, load):
        def wrong():
            raise torch.OutOfMemoryError("no memory is left\nmore")

        found = load("runner").interleave({"wrong": wrong, "right": int}, torch.device("cpu"), 0.0)
        assert set(found.ms) == {"right"}
        assert found.errors == {"wrong": "OutOfMemoryError: no memory is left"}

    def test_compiling_ends_with_its_budget(self, load):
        compiler = load("runner").Compiler(1e-9)
        assert compiler.refusal() is None
        assert compiler.warm(lambda: None) is None
        assert "were spent" in compiler.refusal()
        assert "not asked for" in load("runner").Compiler(0).refusal()
        assert "does not compile: ZeroDivisionError" in compiler.warm(lambda: 1 / 0)

    def test_environment_names_no_machine(self, load):
        text = json.dumps(load("runner").environment(torch.device("cpu")))
        assert torch.__version__ in text
        assert "threads" in text
        assert f"{cpu_build.level()} in fused-cpp" in text
        for name in {socket.gethostname(), platform.node(), str(FOLDER), str(pathlib.Path.home())}:
            assert len(name) < 3 or name not in text

    def test_geometric_mean(self, load):
        assert load("runner").geometric_mean([1, 4, 16]) == pytest.approx(4)


SMALL = [
    "--steps",
    "4",
    "2",
    "--orders",
    "2",
    "4",
    "--dilations",
    "1",
    "--batch",
    "2",
    "--channels",
    "4",
    "--length",
    "3",
]


class TestNeuron:
    def test_it_writes_what_it_measured(self, load, tmp_path, capsys):
        script, files = load("neuron"), {n: tmp_path / f"n.{n}" for n in ("json", "markdown")}
        chosen = ["--kernels", "shifted-add", "vanilla-conv1d"]
        script.main(["--quick", *SMALL, *chosen, "--json", str(files["json"]), "--markdown", str(files["markdown"])])
        found = json.loads(files["json"].read_text())
        assert [(c["T"], c["k"], c["d"]) for c in found["cells"]] == [(2, 2, 1), (4, 2, 1), (4, 4, 1)]
        expected = {"clone", "PSN", "SlidingPSN", "LIF", "vanilla module", "shifted-add", "vanilla-conv1d"}
        for cell in found["cells"]:
            assert set(cell["ms"]["forward+backward"]) == expected
            assert set(cell["ms"]["eval forward"]) == {"clone", "PSN", "shifted-add", "vanilla-conv1d"}
            assert cell["ms"]["eval forward"].keys() == cell["ms"]["training forward"].keys()
            assert cell["rounds"] >= 7
            assert cell["ratio_to_psn"]["PSN"] == 1
            times, passes = cell["ms"]["eval forward"], cell["passes"]["eval forward"]["shifted-add"]
            assert passes == pytest.approx(times["shifted-add"] / (times["clone"] / 2))
            assert cell["share"]["eval forward"]["shifted-add"] == pytest.approx(2 / passes)
            assert any("not asked for" in reason for reason in cell["errors"].values())
        assert set(found["summary"]["ours_to"]) == {"PSN", "vanilla module"}
        text = files["markdown"].read_text()
        assert text.splitlines()[2].startswith("Made by `python benchmarks/neuron.py --quick --steps 4 2")
        assert "| T | k | d | PSN ms | SlidingPSN | LIF | vanilla module | vanilla-conv1d | shifted-add |" in text
        assert "| geometric mean |" in text
        assert text.split("\n\n", 1)[1].strip() in capsys.readouterr().out
        again = tmp_path / "again.md"
        script.main(["--render", str(files["json"]), "--markdown", str(again)])
        assert again.read_text() == text

    def test_the_grid(self, load):
        cells = load("neuron").Settings().cells()
        assert len(cells) == 2 + 4 + 3 * 6 + 1
        assert all(k <= t for t, k, _, _ in cells)
        past = [cell for cell in cells if cell[3] != 32]
        assert [cell[:3] for cell in past] == [(32, 2, 1)]
        assert all(t * n * 128 * 32 * 4 >= 256 << 20 for t, _, _, n in past)

    def test_compiled(self, load):
        script = load("neuron")
        settings = script.Settings(
            steps=(2,), orders=(2,), dilations=(1,), batch=2, channels=4, length=3, past_cache=False, rounds=1,
            seconds=0.0, compile_seconds=1e-9, kernels=("shifted-add",),
        )  # fmt: skip
        found = script.measure(settings, progress=False)  # the first one empties the budget
        times = found["cells"][0]["ms"]["forward+backward"]
        assert "PSN compiled" in times
        assert "LIF compiled" not in times
        assert "were spent" in found["cells"][0]["errors"]["LIF compiled, forward+backward"]
        assert "PSN compiled" in script.tables(found)

    def test_another_level(self, another_level, tmp_path):
        """Our kernels are compiled for it, and torch, which reads its setting when it is loaded, is held to it."""
        file = tmp_path / "n.json"
        command = [sys.executable, str(FOLDER / "neuron.py"), "--march", another_level, "--quick", "--steps", "2"]
        small = ["--orders", "2", "--batch", "2", "--kernels", "fused-cpp", "--seconds", "0", "--json", str(file)]
        subprocess.run([*command, *small], check=True, capture_output=True)
        found = json.loads(file.read_text())
        ours, theirs = {32: ("AVX2", "AVX2"), 16: ("SSE4.2", "DEFAULT")}[cpu_build.register_bytes(another_level)]
        text = f"vectors: {theirs} in torch, {ours} (-march={another_level}) in fused-cpp, "
        assert text in found["environment"]["text"]
        assert f"--march {another_level}" in found["made_by"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--kernels", "nonsense"], "unknown kernels nonsense"), (["--steps", "2", "--orders", "4"], "grid is empty")],
    )
    def test_wrong_use(self, load, arguments, message, capsys):
        with pytest.raises(SystemExit):
            load("neuron").main(["--no-past-cache", *arguments])
        assert message in capsys.readouterr().err

    def test_unknown_level(self, load):
        with pytest.raises(SystemExit, match="MFPSN_FX_MARCH=nonsense is not known to the compiler"):
            load("neuron").main(["--march", "nonsense"])

    def test_without_spikingjelly(self, load, monkeypatch, capsys):
        script = load("neuron")
        monkeypatch.setattr(script.rivals, "MISSING", "PSN, SlidingPSN and LIF are missing: nothing there")
        found = script.main(["--quick", *SMALL[:2], *SMALL[4:], "--orders", "2", "--kernels", "shifted-add"])
        assert "PSN" not in found["cells"][0]["ms"]["forward+backward"]
        out = capsys.readouterr().out
        assert "| clone ms |" in out
        assert "PSN, SlidingPSN and LIF are missing: nothing there." in out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_cuda(self, load):
        with pytest.raises(SystemExit, match="no CUDA device is available"):
            load("neuron").main(["--device", "cuda"])


class TestNetwork:
    def test_it_writes_what_it_measured(self, load, tmp_path, capsys):
        files = [tmp_path / "n.json", tmp_path / "n.md"]
        small = ["--quick", "--steps", "2", "3", "--batch", "2", "--channels", "4", "--seconds", "0"]
        load("network").main([*small, "--kernel", "shifted-add", "--json", str(files[0]), "--markdown", str(files[1])])
        found = json.loads(files[0].read_text())
        assert [r["T"] for r in found["results"]] == [2, 3]
        names = {"no neurons", "LIF", "PSN", "SlidingPSN", "vanilla module", "ours", "ours, BN folded"}
        for result in found["results"]:
            assert set(result["ms"]) == names
            assert set(result["neuron_share"]) == names - {"no neurons"}
            assert result["kernels"] == ["shifted-add"] * 7
            assert result["rounds"] == 3
        assert set(found["geometric_mean_to_psn"]) == names
        text = files[1].read_text()
        assert "Made by `python benchmarks/network.py --quick" in text
        assert (
            "| T | PSN ms | SlidingPSN | LIF | vanilla module | ours | ours, BN folded | no neurons | rounds |" in text
        )
        assert text.split("\n\n", 1)[1].strip() in capsys.readouterr().out

    def test_unknown_kernel(self, load, capsys):
        with pytest.raises(SystemExit):
            load("network").main(["--kernel", "nonsense"])
        assert "unknown time-first kernel nonsense" in capsys.readouterr().err


class TestLayout:
    def test_it_compares_the_rules(self, load, tmp_path, capsys):
        files = [tmp_path / "n.json", tmp_path / "n.md"]
        small = ["--quick", "--networks", "sequential CIFAR", "--channels", "4", "--seconds", "0"]
        load("layout").main([*small, "--json", str(files[0]), "--markdown", str(files[1])])
        (result,) = json.loads(files[0].read_text())["results"]
        rules = ["time-first", "time-last", "uniform", "planned"]
        assert sorted(result["ms"]) == sorted(result["ratio"]) == sorted(rules)
        assert result["ratio"]["time-first"] == 1
        made = result["rules"]
        assert [made[rule]["time_last"] for rule in rules[:2]] == [0, 7]
        assert made["time-first"]["conversions"] == 0 < made["time-last"]["conversions"]
        assert set(made["planned"]["predicted_ms"]) == {"time_first", "time_last", "plan"}
        text = files[1].read_text()
        assert "| network | time-first ms | time-last | uniform | planned | spread | rounds |" in text
        assert "not measured (not compiled: compiling was not asked for): sequential CIFAR time-first compiled" in (
            capsys.readouterr().out
        )

    def test_unknown_network(self, load, capsys):
        with pytest.raises(SystemExit):
            load("layout").main(["--networks", "nonsense"])
        assert "unknown networks ['nonsense']" in capsys.readouterr().err


class TestCompiled:
    def test_it_compares_with_eager_mode(self, load, tmp_path, capsys):
        files = [tmp_path / "n.json", tmp_path / "n.md"]
        small = ["--quick", "--size", "8", "--steps", "2", "--seconds", "0"]
        load("compiled").main([*small, "--json", str(files[0]), "--markdown", str(files[1])])
        (result,) = json.loads(files[0].read_text())["results"]
        networks = ["ours", "SpikingJelly's LIF", "no neurons"]
        assert [list(result["ms"][name]) for name in networks] == [["eager"]] * 3
        assert result["input"] == [2, 2, 3, 8, 8]
        assert result["kernels"]
        assert all(f"| 2×2×3×8×8 | {name} |" in files[1].read_text() for name in networks)
        out = capsys.readouterr().out
        assert (
            "not measured (not compiled: compiling was not asked for): N = 2, ours, Inductor; N = 2, ours, back" in out
        )


class TestSelectionUnderLoad:
    def test_it_counts_the_wrong_decisions(self, load, tmp_path):
        files = [tmp_path / "n.json", tmp_path / "n.md"]
        script = load("selection_under_load")
        found = script.main(["--quick", "--seconds", "0", "--json", str(files[0]), "--markdown", str(files[1])])
        assert json.loads(files[0].read_text()) == json.loads(json.dumps(found))
        (one,) = found["conversions"]
        assert len(one["rows"]) == 2 * 20
        assert {row["mode"] for row in one["rows"]} == {"training", "evaluation"}
        assert all(row["ratio"] >= 1 and (row["ratio"] > 1 or row["kernel"] == row["best"]) for row in one["rows"])
        text = files[1].read_text()
        wrong = [row for row in one["rows"] if row["ratio"] > 1.3]
        for mode in ("training", "evaluation"):
            assert f"{sum(row['mode'] == mode for row in wrong)} of 20" in text
        assert text.count("\n| 1 | ") == 1 + len(wrong)

    def test_what_is_busy_ends_by_itself(self, load):
        script, started = load("selection_under_load"), []

        class Noted(subprocess.Popen):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                started.append(self)

        script.subprocess.Popen, before = Noted, subprocess.Popen
        try:
            with script.busy(2, 0.1):
                assert [process.wait(timeout=60) for process in started] == [0, 0]
            with pytest.raises(KeyError), script.busy(1, 60.0):
                raise KeyError
        finally:
            script.subprocess.Popen = before
        assert len(started) == 3
        assert all(process.poll() is not None for process in started)


class TestPictures:
    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
    def test_they_are_drawn(self, load, tmp_path):
        load("neuron").main(["--quick", *SMALL, "--kernels", "shifted-add", "--png", str(tmp_path / "new" / "n.png")])
        assert (tmp_path / "new" / "n.png").read_bytes().startswith(b"\x89PNG")

    def test_missing_matplotlib_is_told_before_measuring(self, load, monkeypatch):
        never = lambda *args, **options: pytest.fail("measured first")  # noqa: E731
        network = dataclasses.replace(load("network").BENCHMARK, measure=never)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            network.main(["--quick", "--png", "n.png"])


class TestGpuKernels:
    def test_registered_kernels_pass(self, load, capsys):
        assert load("gpu_kernels").main(["--device", "cpu", "--tiny", "--seconds", "4"]) == 0
        out = capsys.readouterr().out
        for kernel in mfpsn_fx.kernels.kernels():
            assert f"{kernel.name}: " in out
        assert " 0 failed" in out

    @pytest.mark.parametrize("fault", ["fire", "backward_input", "random", "raises"])
    def test_a_wrong_kernel_fails(self, load, fault, capsys):
        class Wrong(ShiftedAdd):
            pass

        def fire(self, call, x, taps, bias):
            if fault == "raises":
                raise RuntimeError("cannot")
            return ShiftedAdd.fire(self, call, x, taps.flip(1), bias)

        def backward_input(self, call, grad, x, *rest):
            dx, *others = ShiftedAdd.backward_input(self, call, grad, x, *rest)
            noise = 1e-6 * torch.rand_like(dx) if fault == "random" else 0.1
            return dx + noise, *others

        if fault in ("fire", "raises"):
            Wrong.fire = fire
        else:
            Wrong.backward_input = backward_input
        mfpsn_fx.register_kernel("wrong")(Wrong)
        try:
            script = load("gpu_kernels")
            assert script.main(["--device", "cpu", "--tiny", "--seconds", "1", "--kernels", "wrong"]) == 1
        finally:
            unregister_kernel("wrong")
        out = capsys.readouterr().out
        where = {"fire": "given_taps", "backward_input": "whole", "random": "repeated", "raises": "given_taps"}[fault]
        assert f"FAILED wrong {where}, " in out
        assert ("RuntimeError: cannot" in out) is (fault == "raises")

    def test_the_first_forty_cases_cover_all_ways_through_memory(self, load):
        """Of the CUDA kernel: threads along channels or positions, vector width, tile; with each dtype, with a mask."""
        script = load("gpu_kernels")
        cases = script.cases()
        assert len(set(cases)) == len(cases) > 10000
        every = frozenset().union(*map(script.accesses, cases))
        assert frozenset().union(*map(script.accesses, cases[:40])) == every
        assert {a[1] for a, _ in every} == {1, 2, 4, 8}
        assert {a[2] for a, _ in every} == {True, False}
        # and by the time that greedy choice is through, every pair of settings was met
        assert frozenset().union(*map(script.pairs, cases[:120])) == frozenset().union(*map(script.pairs, cases))

    def test_shards_share_the_cases(self, load, capsys):
        script = load("gpu_kernels")
        cases = script.cases(tiny=True, layout="time_last")
        assert cases
        assert all(str(case.layout) == "time_last" for case in cases)
        assert script.shard("2/3") == (2, 3)
        for text in ("0/3", "4/3", "1", "a/b"):
            with pytest.raises(SystemExit):
                script.main(["--device", "cpu", "--shard", text])
            assert "a shard is I/N" in capsys.readouterr().err

    def test_it_writes_as_it_goes_and_ends_at_a_fault(self, load, tmp_path, capsys):
        """After an illegal access every call of the process fails: what follows would say nothing."""

        class Faulty(ShiftedAdd):
            left = 3

            def fire(self, call, x, taps, bias):
                Faulty.left -= 1
                if Faulty.left < 0:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                return ShiftedAdd.fire(self, call, x, taps, bias)

        mfpsn_fx.register_kernel("faulty")(Faulty)
        script, file = load("gpu_kernels"), tmp_path / "k.json"
        try:
            assert script.main(["--device", "cpu", "--tiny", "--kernels", "faulty", "--json", str(file)]) == 1
        finally:
            unregister_kernel("faulty")
        found = json.loads(file.read_text())
        assert found["counts"]["faulty"]["failed"] == 1
        assert found["cases"] < found["of"]
        assert "illegal memory access" in found["failures"][0]
        assert "ended at a fault of the device" in capsys.readouterr().out

    def test_only_some_cases(self, load, capsys):
        script = load("gpu_kernels")
        text = str(script.cases(tiny=True)[5])
        assert script.main(["--device", "cpu", "--tiny", "--kernels", "shifted-add", "--only", text]) == 0
        assert "1 of 1 cases" in capsys.readouterr().out

    def test_nothing_checked_is_a_failure(self, load, capsys):
        mfpsn_fx.register_kernel("nowhere", unavailable=lambda: "not on this machine")(ShiftedAdd)
        try:
            script = load("gpu_kernels")
            assert script.main(["--device", "cpu", "--tiny", "--seconds", "1", "--kernels", "nowhere"]) == 1
        finally:
            unregister_kernel("nowhere")
        assert "not on this machine" in capsys.readouterr().out


class TestGpuTimes:
    def test_it_writes_what_it_measured(self, load, tmp_path, capsys):
        script, files = load("gpu_times"), {n: tmp_path / f"n.{n}" for n in ("json", "md", "png", "again.md")}
        arguments = ["--json", str(files["json"]), "--markdown", str(files["md"])]
        script.main(
            ["--device", "cpu", "--quick", "--seconds", "0", "--kernels", "shifted-add", "vanilla-conv1d", *arguments]
        )
        found = json.loads(files["json"].read_text())
        assert [cell["cell"] for cell in found["cells"]] == [cell.name for cell in script.QUICK]
        ours, rivals = {"shifted-add", "vanilla-conv1d"}, {"PSN", "LIF"}
        norms = {f"norm + {name}" for name in ours | rivals} | {f"folded norm + {name}" for name in ours}
        for cell in found["cells"]:
            names = ours if cell["masked"] else ours | rivals | norms
            assert cell["graph_ms"]["forward+backward"].keys() == names | {"clone"}
            assert cell["eager_ms"].keys() == cell["host_ms"].keys() == names
            assert not cell["errors"]
        assert "| 4×2×8×4×4 | 2 |" in files["md"].read_text()
        if importlib.util.find_spec("matplotlib") is not None:
            script.main(
                ["--render", str(files["json"]), "--markdown", str(files["again.md"]), "--png", str(files["png"])]
            )
            assert files["again.md"].read_text() == files["md"].read_text()
            assert files["png"].read_bytes().startswith(b"\x89PNG")
        capsys.readouterr()

    def test_a_variant_that_fails_is_named_and_the_others_go_on(self, load, monkeypatch, capsys):
        script = load("gpu_times")
        monkeypatch.setattr(script.rivals, "psn", lambda steps: 1 / 0)
        monkeypatch.setattr(script, "QUICK", script.QUICK[:1])
        found = script.main(["--device", "cpu", "--quick", "--seconds", "0", "--kernels", "shifted-add"])
        assert found["cells"][0]["errors"]["PSN"] == "ZeroDivisionError: division by zero"
        assert {"shifted-add", "LIF"} <= found["cells"][0]["eager_ms"].keys()
        out = capsys.readouterr().out
        assert "not measured (ZeroDivisionError: division by zero): 4×2×8×4×4, k = 2: PSN; " in out

    def test_a_graph_is_captured_after_warm_up(self, load, monkeypatch):
        """The driver is a stand-in: what compiles or loads at a first call must have run before a capture begins."""
        script, log = load("gpu_times"), []

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                log.append("wait")

        class Graph:
            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def during(what):
            log.append(f"begin {what}")
            yield
            log.append(f"end {what}")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: during("side stream"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: during(f"capture in {pool}"))
        replay = script.captured(lambda: log.append("run"), torch.device("cuda"), "a pool")
        assert log == [
            "wait", "begin side stream", "run", "run", "run", "end side stream", "wait",
            "begin capture in a pool", "run", "end capture in a pool",
        ]  # fmt: skip
        replay()
        assert log[-1] == "replay"


class TestGpuCheck:
    def run(self, *arguments, **environment):
        return subprocess.run(
            ["sh", str(FOLDER / "gpu_check.sh"), *arguments], capture_output=True, text=True, check=False,
            env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment},
        )  # fmt: skip

    def test_a_signal_ends_its_steps_and_what_there_is_gets_packed(self, tmp_path):
        scratch, out = tmp_path / "tmp", tmp_path / "out"
        scratch.mkdir()
        # stands in for Python: the checks at the beginning pass, every step sleeps
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase "$1" in *.py) echo $$ >>{tmp_path}/pids; exec sleep 600 ;; esac\n')
        python.chmod(0o755)
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "DEVICE": "cpu", "TMPDIR": str(scratch)}
        check = subprocess.Popen(["sh", str(FOLDER / "gpu_check.sh"), str(out)], env=environment)
        while not (tmp_path / "pids").exists():
            assert check.poll() is None
            time.sleep(0.01)
        check.terminate()
        assert check.wait() == 143
        assert (out / "gpu_check.tar.gz").exists()
        assert not list(scratch.iterdir())
        for pid in (tmp_path / "pids").read_text().split():
            while pathlib.Path("/proc", pid).exists() and "sleep" in pathlib.Path("/proc", pid, "cmdline").read_text():
                time.sleep(0.01)

    def test_a_folder_with_results_in_it(self, tmp_path):
        (tmp_path / "times.json").write_text("{}")
        done = self.run(str(tmp_path), DEVICE="cpu")
        assert done.returncode == 2
        assert "is not empty" in done.stderr

    def test_a_step_past_its_time_fails_and_the_archive_is_there(self, tmp_path):
        done = self.run(str(tmp_path / "out"), DEVICE="cpu", HOME=str(pathlib.Path.home()), LIMIT="0")
        assert done.returncode == 1
        assert "facts: FAILED: no time was left of 0 s" in (tmp_path / "out" / "summary.txt").read_text()
        assert (tmp_path / "out" / "gpu_check.tar.gz").exists()

    def test_it_wants_a_folder(self):
        done = self.run()
        assert done.returncode == 2
        assert "usage: benchmarks/gpu_check.sh OUT_FOLDER" in done.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_cuda(self, tmp_path):
        done = self.run(str(tmp_path / "out"))
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr


def test_the_checkout_serves_without_an_installation(tmp_path):
    """The loader alone: the package is hidden from importlib.metadata and from the path."""
    code = (
        "import importlib.metadata as m, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "def gone(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = gone\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import checkout, mfpsn_fx.passes, mfpsn_fx.kernels as k\n"
        "print(k.__name__, len(k.kernels()) > 3)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["mfpsn_fx.kernels", "True"]


def test_what_is_missing_is_named(load, monkeypatch):
    checkout = load("checkout")
    monkeypatch.setattr(checkout, "missing", lambda: ["tabulate"])
    with pytest.raises(SystemExit, match=r"tabulate missing: .* carry tabulate-\*\.whl"):
        checkout.use_checkout()
