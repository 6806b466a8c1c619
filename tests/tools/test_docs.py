"""What the manual tells its readers to type works as it says."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import torch

import mfpsn_fx
from mfpsn_fx.kernels import reference, unregister_kernel

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


def test_links_lead_somewhere():
    root, count = DOCS.parent, 0
    for page in (*root.glob("*.md"), *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            full = page.parent / path if path else page
            assert full.exists(), f"{page.relative_to(root)}: {target}"
            if anchor and full.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", full.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, f"{page.relative_to(root)}: {target}"
            count += 1
    assert count > 80


def test_the_recipes_pass_in_one_file_and_one_test_file(tmp_path):
    """What CONTRIBUTING shows stands alone beside a copy of the sources: tests pass, and ruff is content."""
    text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        parts = re.split(r"^# ([\w/]+\.py).*\n", block, flags=re.MULTILINE)
        files |= {path: code.strip() + "\n" for path, code in zip(parts[1::2], parts[2::2], strict=True)}
    assert len(files) == 6
    installed = {"kernels": "mfpsn_fx/kernels", "passes": "mfpsn_fx/passes"}
    for folder in ("mfpsn_fx", "kernels", "passes", "tests"):
        target = tmp_path / installed.get(folder, folder)
        shutil.copytree(DOCS.parent / folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(DOCS.parent / "pyproject.toml", tmp_path)
    written = {}
    for path, code in files.items():
        top, _, rest = path.partition("/")
        written[path] = tmp_path / installed.get(top, top) / rest
        assert not written[path].exists(), path
        written[path].write_text(code, encoding="utf-8")

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("-m", "ruff", "check", *map(str, written.values()))
    tests = [str(path) for name, path in written.items() if name.startswith("tests/")]
    assert "3 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    # without another file that names it
    assert "one-tap" in run("-c", "import mfpsn_fx; print(*[k.name for k in mfpsn_fx.kernels.kernels()])").split()


def test_the_reference_of_options_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make", DOCS / "reference" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.PAGE.read_text(encoding="utf-8") == make.page(), "run python docs/reference/make.py"


def test_a_kernel_of_ones_own(distorted, capsys):
    """docs/guide/kernels.md: registered, forced, right, and chosen by autoselect once it is the fastest."""
    section = (DOCS / "guide" / "kernels.md").read_text(encoding="utf-8").split("## A kernel of your own")[1]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/guide/kernels.md", "exec"), names)
        assert "two-taps" in capsys.readouterr().out
        x, one = torch.randn(5, 3, 4), torch.ones(4)
        arguments = (x, torch.randn(4, 2), one, -one, 0 * one, one)
        options = {"training": True, "dilation": 2}
        grad = torch.randn_like(x)
        spikes, mean, var = torch.ops.mfpsn.neuron(*arguments, **options, method="two-taps")
        assert torch.equal(spikes.double(), reference.forward(*arguments, **options).spikes)
        found = torch.ops.mfpsn.neuron_backward(grad, *arguments[:4], mean, var, **options, method="two-taps")
        wanted = reference.backward(grad, *arguments, surrogate=mfpsn_fx.ATan(2.0), **options)
        for ours, theirs in zip(found[:4], wanted[:4], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
        # nothing but the measurement decides: a clock that favors it makes autoselect bind it
        distorted(lambda problem, name: [0.1 if name == "two-taps" else 1.0] * 3)
        model = mfpsn_fx.convert(names["net"], torch.randn(8, 4, 3), progress=False)
        assert [row.kernel for row in mfpsn_fx.selection(model).rows] == ["two-taps"]
    finally:
        unregister_kernel("two-taps")
