"""The house itself: floors, names, the wheel, the command line, the demo's parts."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import mfpsn_fx
import mfpsn_fx.__main__

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLOORS = {"mfpsn_fx.kernels": 1, "mfpsn_fx.model": 2, "mfpsn_fx.passes": 3, "mfpsn_fx": 4}
FOLDERS = {"kernels": "mfpsn_fx.kernels", "mfpsn_fx/model": "mfpsn_fx.model", "passes": "mfpsn_fx.passes",
           "mfpsn_fx": "mfpsn_fx"}  # fmt: skip


def floor(module: str) -> int:
    for package, level in FLOORS.items():
        if module == package or module.startswith(f"{package}."):
            return level
    raise LookupError(module)


def ours(path: pathlib.Path, package: str):
    """(imported module, line) of every import of ours in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            names = [".".join([*base, *([node.module] if node.module else [])])]
            if not node.module:
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "mfpsn_fx":  # `from mfpsn_fx import kernels` names the module in what it imports
                names = [f"mfpsn_fx.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "mfpsn_fx")


def test_imports_run_downwards():
    seen, faults = 0, []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            for name, line in ours(path, package):
                seen += 1
                if floor(name) > FLOORS[package]:
                    faults.append(f"{path.relative_to(ROOT)}:{line} (floor {FLOORS[package]}) imports {name}")
    assert seen > 50
    assert faults == []


def test_source_libraries_are_never_imported():
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not {n.split(".")[0] for n in names} & {"spikingjelly", "snntorch", "norse", "nir"}, path


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_packages_refuse_other_names(folder):
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    with pytest.raises(ImportError, match=rf"this package is mfpsn_fx\.{folder}, but was imported as '{folder}'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_no_module_bears_a_librarys_name():
    names = {p.stem for folder in FOLDERS for p in (ROOT / folder).glob("*.py")}
    assert not names & {"triton", "torch", "numpy", "networkx", "tabulate", "tqdm", "hypothesis", "norse", "nir"}


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
        for kernel in mfpsn_fx.kernels.kernels():
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
        compiler = tmp_path / "c++"  # not optimised, in a third of the time
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
