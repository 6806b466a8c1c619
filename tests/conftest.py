"""What the tests share: stand-ins for what SpikingJelly's models import, seeds, small networks."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn


def _torchvision_stub() -> None:
    """SpikingJelly's ResNets and VGGs import torchvision for downloads only, and no wheel of it fits CPU torch."""
    outer, inner = types.ModuleType("torchvision"), types.ModuleType("torchvision._internally_replaced_utils")
    inner.load_state_dict_from_url = None
    outer._internally_replaced_utils = inner
    sys.modules.setdefault("torchvision", outer)
    sys.modules.setdefault("torchvision._internally_replaced_utils", inner)


_torchvision_stub()

from spikingjelly.activation_based import functional, layer, neuron, surrogate  # noqa: E402

from mfpsn_fx.kernels import fold  # noqa: E402
from mfpsn_fx.kernels.autotune.race import Outcome, Results  # noqa: E402
from mfpsn_fx.kernels.build import cpu as cpu_build  # noqa: E402
from mfpsn_fx.passes.planning import measure_layers as measure_layers  # noqa: E402
from mfpsn_fx.passes.planning import measure_neurons as autoselect  # noqa: E402


def _another_level() -> str | None:
    """Return a level of x86-64 that runs here, with vectors narrower than this processor's; None if there is none."""
    for march in ("x86-64-v3", "x86-64-v2"):
        with contextlib.suppress(cpu_build.BuildError):
            narrower = cpu_build.register_bytes(march) != cpu_build.register_bytes("native")
            if narrower and cpu_build.refusal(march) is None:
                return march
    return None


_NO_LEVEL = "the C++ kernels have no second level here: none of x86-64, or no compiler for it"


def pytest_addoption(parser):
    parser.addoption("--another-level", action="store_true", help="compile the C++ kernels for narrower vectors")


def pytest_configure(config):
    if config.getoption("--another-level"):
        march = _another_level()
        if march is None:
            pytest.exit(_NO_LEVEL, returncode=0)
        os.environ[cpu_build.VARIABLE] = march


def pytest_report_header():
    return f"C++ kernels: -march={os.environ.get(cpu_build.VARIABLE) or 'native'}"


@pytest.fixture
def another_level() -> str:
    """What MFPSN_FX_MARCH may be for vectors narrower than this processor's; skips where nothing is."""
    return _another_level() or pytest.skip(_NO_LEVEL)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test meets what a user, or another test, has measured."""
    monkeypatch.setenv("MFPSN_FX_CACHE", str(tmp_path_factory.mktemp("selections")))


@pytest.fixture
def script(monkeypatch) -> Iterator[Callable[[str], types.ModuleType]]:
    """``script(path)``: a file of the repository that is in no package, as a module; it may import its neighbors."""
    root, before = pathlib.Path(__file__).resolve().parent.parent, set(sys.modules)

    def load(path):
        monkeypatch.syspath_prepend(str((root / path).parent))
        name = "mfpsn_script_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, root / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if pathlib.Path(getattr(sys.modules[name], "__file__", None) or "/").parent == root / "benchmarks":
            del sys.modules[name]


@pytest.fixture
def distorted(monkeypatch) -> Callable[..., list[tuple[types.SimpleNamespace, str]]]:
    """``distorted(times, conversion)``: a clock that shows what it is told, every time.

    ``times(problem, kernel)`` gives milliseconds of forward, backward and evaluation, ``problem`` having the attributes
    of a variant's key (layout, shape, order …); ``conversion`` is the time of a conversion, either way, and of a
    layer. Returned is a list that fills with what was asked for.
    """

    def distort(times, conversion=0.01):
        asked = []

        def outcome(variant):
            problem = types.SimpleNamespace(**variant.key)
            if problem.op == "layer":
                found = {"training": conversion}
            elif problem.op == "to_layout":
                found = {"forward": conversion, "backward": conversion}
            else:
                problem.shape = tuple(problem.shape)
                asked.append((problem, variant.name))
                found = dict(zip(("forward", "backward", "eval"), times(problem, variant.name), strict=True))
            return Outcome({part: (ms,) * 5 for part, ms in found.items()})

        def run_races(races, **options):
            return Results(tuple({e.name: outcome(e) for e in race.variants} for race in races))

        for module in (autoselect, measure_layers):
            monkeypatch.setattr(module, "run_races", run_races)
        return asked

    return distort


@pytest.fixture
def one_thread():
    """For files whose tensors are small: on a busy machine threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LifNet(nn.Module):
    """(T, N, 1, 8) → (N, 3): two convolutions and a hidden layer, three LIF layers."""

    def __init__(self, make=None, channels: int = 4) -> None:
        super().__init__()
        make = make or (lambda: neuron.LIFNode(surrogate_function=surrogate.ATan()))
        self.features = nn.Sequential(
            layer.Conv1d(1, channels, 3, padding=1),
            layer.BatchNorm1d(channels),
            make(),
            layer.Conv1d(channels, channels, 3, padding=1),
            make(),
            layer.Flatten(),
            layer.Linear(8 * channels, 6),
            make(),
        )
        self.head = layer.Linear(6, 3)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.head(self.features(x)).mean(0)


@pytest.fixture
def net() -> LifNet:
    return LifNet()


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(6, 5, 1, 8)


@pytest.fixture
def at_the_threshold() -> tuple[torch.Tensor, ...]:
    """(x, weight, γ, β, mean, var) in eval: x[0] reaches each of 512 thresholds exactly, x[1] is one unit below.

    A kernel that folds on its own and rounds otherwise than ``kernels.fold`` fires wrongly on one of the two.
    """
    weight, gamma, beta, mean = (torch.randn(512) for _ in range(4))
    var = torch.rand(512) + 0.1
    folded = fold(weight[:, None], gamma, beta, mean, var, 1e-5)
    tap = folded.taps[:, 0]
    reached = -folded.bias / tap  # exact: the tap is a power of two
    below = torch.nextafter(reached, torch.copysign(torch.full_like(reached, torch.inf), -tap))
    return torch.stack([reached, below])[:, None], weight[:, None], gamma, beta, mean, var
