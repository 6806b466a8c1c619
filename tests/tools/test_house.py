"""The house itself: floors, names, the wheel, the command line, the demo's parts."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import networkx as nx
import pytest

import mfpsn_fx
import mfpsn_fx.__main__

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("kernels", "passes", "mfpsn_fx")
# what stands beside the passes of the pipeline in passes/
BESIDE_PASSES = {"__init__", "base", "context", "errors", "options", "neurons", "example_run", "op_traits",
                 "channel_inference", "fit_taps"}  # fmt: skip
LIBRARIES = {"triton", "torch", "numpy", "networkx", "tabulate", "tqdm", "hypothesis", "norse", "nir", "snntorch",
             "spikingjelly"}  # fmt: skip


def script(path: str):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


floors = script("docs/design/draw_floors.py")


def test_imports_run_downwards():
    known, seen, faults = floors.modules(), 0, []
    for module, path in known.items():
        for name, line in floors.imports(module, path, known):
            seen += 1
            if floors.floor(name) > floors.floor(module):
                faults.append(f"{path.relative_to(ROOT)}:{line} (floor {floors.floor(module)}) imports {name}")
    assert seen > 300
    assert faults == []


def test_no_imports_in_functions_run_upwards():
    """Nor do those that run later: they are written with the same names."""
    known = floors.modules()
    for path in (p for folder in SOURCES for p in (ROOT / folder).rglob("*.py")):
        (module,) = (m for m, other in known.items() if other == path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("mfpsn_fx."):
                assert floors.floor(node.module) <= floors.floor(module), (path, node.lineno)


def test_no_imports_run_in_a_circle():
    known, graph = floors.modules(), nx.DiGraph()
    for module, path in known.items():
        graph.add_edges_from((module, name) for name, _ in floors.imports(module, path, known) if name != module)
    # a package's __init__ collects what its modules offer, and none of them imports it
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


def test_what_stands_in_plain_view_in_passes_is_a_pass():
    for path in sorted((ROOT / "passes").glob("*.py")):
        if path.stem in BESIDE_PASSES:
            continue
        module = importlib.import_module(f"mfpsn_fx.passes.{path.stem}")
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        passes = [one for one in own if issubclass(one, mfpsn_fx.Pass)]
        assert passes, f"passes/{path.name} holds no pass; it belongs into a folder"
        for one in passes:
            assert one.name, one
            assert "Before" in one.__doc__ or "unchanged" in one.__doc__, (
                f"{one.__name__} does not show before and after"
            )


def test_every_pass_shows_before_and_after():
    def subclasses(cls):
        return {s for c in cls.__subclasses__() for s in (c, *subclasses(c))}

    ours = {one for one in subclasses(mfpsn_fx.Pass) if one.__module__.startswith("mfpsn_fx.")}
    assert len(ours) > 15
    for one in ours:
        assert one.__doc__, one
        assert "Before" in one.__doc__, f"{one.__name__} does not show before and after"


def test_folders_are_installed_and_say_what_they_hold():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {m for m, path in floors.modules().items() if path.name == "__init__.py"}
    assert packages == found
    for module in found:
        assert floors.modules()[module].read_text(encoding="utf-8").startswith('"""'), module
    kept = set((ROOT / "kernels" / "csrc").rglob("*.*"))
    assert {p.parent.name for p in kept} == {"cpu", "cuda"}


def test_tests_mirror_the_folders():
    """A folder of tests is named after one of the sources; what tests is flat is what the folder's own files do."""
    for floor, folder in (("kernels", "kernels"), ("model", "mfpsn_fx/model"), ("passes", "passes")):
        for one in (ROOT / "tests" / floor).iterdir():
            if one.is_dir() and one.name != "__pycache__":
                assert (ROOT / folder / one.name).is_dir(), one
    assert {p.name for p in (ROOT / "tests").glob("*.py")} == {"conftest.py"}


def test_the_picture_of_the_floors_shows_every_folder(tmp_path):
    graph = floors.folders()
    assert {"mfpsn_fx", "mfpsn_fx.passes.planning", "mfpsn_fx.kernels.csrc"} & set(graph) == {
        "mfpsn_fx", "mfpsn_fx.passes.planning",
    }  # fmt: skip
    floors.draw(tmp_path / "floors.svg")
    assert (tmp_path / "floors.svg").stat().st_size > 10_000
    assert (ROOT / "docs" / "design" / "floors.svg").is_file()


def test_source_libraries_are_never_imported():
    for path in (p for folder in SOURCES for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {n.split(".")[0] for n in names} & {"spikingjelly", "snntorch", "norse", "nir"}, path


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_packages_refuse_other_names(folder):
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    with pytest.raises(ImportError, match=rf"this package is mfpsn_fx\.{folder}, but was imported as '{folder}'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_no_module_bears_a_librarys_name_or_says_nothing():
    names = {p.stem for folder in SOURCES for p in (ROOT / folder).rglob("*.py")}
    assert not names & (LIBRARIES | {"utils", "helpers", "common", "misc"})


def test_everything_public_has_a_docstring():
    for name in mfpsn_fx.__all__:
        assert (getattr(mfpsn_fx, name).__doc__ or "").strip(), name


def test_wheel_outside_the_checkout(tmp_path):
    """Built, unpacked elsewhere, imported from there, it converts."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, text=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("mfpsn_fx-*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    assert sorted(p.name for p in target.iterdir() if p.suffix != ".dist-info") == ["bin", "mfpsn_fx"]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, mfpsn_fx\n"
        "from spikingjelly.activation_based import neuron\n"
        "assert mfpsn_fx.__file__.startswith(sys.argv[1]), mfpsn_fx.__file__\n"
        "import mfpsn_fx.kernels as k; assert k.__file__.startswith(sys.argv[1])\n"
        "m = torch.nn.Sequential(torch.nn.Linear(3, 3), neuron.LIFNode(step_mode='m'))\n"
        "x = torch.randn(4, 2, 3)\n"
        "c = mfpsn_fx.convert(m, x, repeats=1, progress=False)\n"
        "c(x).sum().backward(); print(mfpsn_fx.selection(c).rows[0].layer)\n"
    )
    # -P and an empty folder: neither the checkout nor its editable finder may answer first
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(target)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "1"


class TestCommandLine:
    def run(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "mfpsn_fx", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )

    def test_kernels(self):
        done = self.run("kernels")
        assert done.returncode == 0
        built_in = [k for k in mfpsn_fx.kernels.kernels() if k.parts.__class__.__module__.startswith("mfpsn_fx.")]
        assert len(built_in) >= 8
        for kernel in built_in:  # others may be registered in this process by other tests
            assert kernel.name in done.stdout
        assert "cpu" in done.stdout

    def test_kernels_that_cannot_run_say_why(self, capsys):
        from mfpsn_fx.__main__ import main
        from mfpsn_fx.kernels import unregister_kernel
        from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

        mfpsn_fx.register_kernel("lacking", unavailable=lambda: "no compiler was found")(ShiftedAdd)
        try:
            assert main(["kernels"]) == 0
        finally:
            unregister_kernel("lacking")
        assert re.search(r"lacking .*not on cpu: no compiler was found", capsys.readouterr().out)

    def test_build(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        compiler = tmp_path / "c++"  # not optimized, in a third of the time
        compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        done = self.run("build")
        assert done.returncode == 0, done.stderr
        assert "fused-cpp: built" in done.stdout
        assert "compiling the C++ kernels" in done.stderr
        assert len(list(tmp_path.rglob("fused_cpu_*.so"))) == 1
        assert "compiling" not in self.run("build").stderr
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.delenv("CXX")
        done = self.run("build")
        assert done.returncode == 1
        assert "fused-cpp: no C++ compiler was found" in done.stdout

    def test_wrong_use(self):
        assert self.run().returncode == 2
        assert self.run("nonsense").returncode == 2
        assert self.run("kernels", "--nonsense").returncode == 2

    def test_compatibility_is_a_script_of_the_checkout(self, monkeypatch, tmp_path, capsys):
        done = self.run("compatibility", "--help")
        assert done.returncode == 0
        assert {"--markdown", "--only", "--backend"} <= set(done.stdout.split())
        monkeypatch.setattr("mfpsn_fx.__main__._EXAMPLES", tmp_path)
        assert mfpsn_fx.__main__.main(["compatibility"]) == 1
        assert "examples/compatibility/report.py is part of the repository, not of the" in capsys.readouterr().err

    def test_demo_in_small(self):
        done = self.run("demo", "--epochs", "2", "--seeds", "1", "--eager")
        assert done.returncode == 0, done.stderr
        for words in ("features.2", "total time_last", "test accuracy %", "LIF 1 epochs, converted, then 1 more"):
            assert words in done.stdout
