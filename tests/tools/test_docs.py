"""What the manual tells its readers to type works as it says."""

from __future__ import annotations

import importlib.util
import pathlib
import re

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
