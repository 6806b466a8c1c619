"""What a converted network looks like: pictures, and tables in several styles."""

from __future__ import annotations

import html.parser
import pickle
import re
import shutil

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx.drawing import to_dot
from mfpsn_fx.passes import conversion_nodes
from mfpsn_fx.selection import Row, Selection

pytestmark = pytest.mark.usefixtures("one_thread")


class Branching(nn.Module):
    """A skip, a norm that is folded, a reshape that asks for shapes."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1, self.s1 = layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode()
        self.c2, self.s2 = layer.Conv2d(4, 4, 3, padding=1), neuron.LIFNode()
        self.head, self.s3 = layer.Linear(4 * 36, 5), neuron.LIFNode()
        functional.set_step_mode(self, "m")

    def forward(self, x):
        y = self.s1(self.b1(self.c1(x)))
        z = self.s2(self.c2(y)) + y
        return self.s3(self.head(z.view(z.shape[0], z.shape[1], -1))).mean(0)


def converted(layout, kernels="shifted-add"):
    x = torch.rand(4, 3, 2, 6, 6)
    return mfpsn_fx.convert(Branching(), x, layout=layout, kernels=kernels, repeats=1, progress=False)


@pytest.fixture
def late(distorted):
    distorted(lambda problem, name: [1.0] * 3)  # where conversions stand is no matter of a real clock
    return converted("time_last")


def edges(text):
    """{(from, to): attributes}; a node may have several edges to another."""
    return [(a, b, rest) for a, b, rest in re.findall(r'^  "(\w+)" -> "(\w+)"(.*);$', text, re.MULTILINE)]


def fills(text):
    return dict(re.findall(r'^  "(\w+)" \[.*fillcolor="(#\w+)"', text, re.MULTILINE))


class TestDot:
    def test_layouts_are_colors(self, late):
        text = to_dot(late)
        found = fills(text)
        last = {found[name] for name in ("c1", "norm_affine", "s1", "c2", "s2", "add", "head", "s3")}
        assert len(last) == 1
        assert last != {found["view"]} == {found["x"]}
        assert 'label="time-first"' in text
        assert 'label="time-last"' in text
        one = to_dot(converted("time_first"))
        assert len(set(fills(one).values())) == 1
        assert "legend" not in one

    def test_conversions_are_marked_edges_with_bytes(self, late):
        marked = [(a, b, rest) for a, b, rest in edges(to_dot(late)) if "penwidth=2" in rest]
        assert len(marked) == len(conversion_nodes(late)) == 3
        size = 4 * 3 * 4 * 36 * 4 / 1024
        found = {(a, b): rest for a, b, rest in marked}
        assert f"to time-last\\n{size / 2:.1f} KiB" in found["x", "c1"]
        assert f"to time-first\\n{size:.1f} KiB" in found["add", "view"]
        assert f"to time-last\\n{size:.1f} KiB" in found["view", "head"]

    def test_bytes_at_neurons_are_known_in_copies(self):
        net = nn.Sequential(nn.LayerNorm(3), neuron.LIFNode(step_mode="m"), nn.LayerNorm(3))
        options = {"kernels": "shifted-add", "repeats": 1, "progress": False}
        model = mfpsn_fx.convert(net, torch.rand(4, 2, 3), layout="time_last", **options)
        text = to_dot(pickle.loads(pickle.dumps(model)))
        assert text.count("to time-last\\n96 B") == text.count("to time-first\\n96 B") == 1

    def test_neurons_show_kernels_and_times(self, late):
        text = to_dot(late)
        for row in mfpsn_fx.selection(late).rows:
            wanted = f"{row.layer}\\nLIFNode, k = 2, d = {row.dilation}\\nshifted-add\\n"
            assert f"{wanted}{row.forward_ms:.3f} + {row.backward_ms:.3f} ms" in text

    def test_what_reads_shapes_is_left_out(self, late):
        text = to_dot(late)
        assert "getattr" not in text
        assert "getitem" not in text
        found = {(a, b) for a, b, _ in edges(text)}
        assert {("x", "c1"), ("c1", "norm_affine"), ("s1", "add"), ("s2", "add"), ("view", "head")} <= found
        assert [rest for a, b, rest in edges(text) if (a, b) == ("norm_affine", "s1")][1].count("scale, shift") == 1
        assert "b1\\nBatchNorm2d, fused" in text
        assert re.search(r"c2\\nConv2d, time-last: (wide|fold)", text)

    def test_several_readers_of_one_copy(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.s1, self.a, self.b = neuron.LIFNode(step_mode="m"), nn.LayerNorm(3), nn.LayerNorm(3)

            def forward(self, x):
                y = self.s1(x)
                return self.a(y), self.b(y)

        x = torch.rand(4, 2, 3)
        options = {"kernels": "shifted-add", "repeats": 1, "progress": False}
        model = mfpsn_fx.convert(Two(), x, layout="time_last", **options)
        text = to_dot(model)
        point = next(node.name for node in conversion_nodes(model) if len(node.users) == 2)
        assert f'"{point}" [shape=point' in text
        assert {b for a, b, _ in edges(text) if a == point} == {"a", "b"}
        assert sum("penwidth=2" in rest for _, b, rest in edges(text) if b == point) == 1

    def test_neurons_inside_leaves_and_unmeasured_ones(self):
        class Leaf(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.sn = nn.Linear(3, 3), neuron.LIFNode(step_mode="m")

            def forward(self, x):
                return self.sn(self.fc(x)) if x.sum() > 0 else x  # cannot be traced

        net = nn.Sequential(Leaf(), nn.Linear(3, 2), neuron.LIFNode(step_mode="m"))
        x = torch.rand(4, 2, 3)
        model = mfpsn_fx.convert(net, x, kernels="shifted-add", layout="time_first", repeats=1, progress=False)
        text = to_dot(model)
        assert re.search(r'label="0\\nLeaf\\n0.sn\\nLIFNode, k = 2, d = 1\\nshifted-add\\n[\d.]+ \+ [\d.]+ ms"', text)
        plain = nn.Sequential(nn.Linear(3, 2), neuron.LIFNode(step_mode="m"))
        assert " ms" not in to_dot(mfpsn_fx.convert(plain))

    def test_what_is_no_converted_network(self):
        with pytest.raises(TypeError, match=r"not a network that mfpsn_fx\.convert returned"):
            to_dot(nn.Linear(2, 2))


class TestFiles:
    def test_text(self, late, tmp_path):
        mfpsn_fx.draw(late, tmp_path / "plan.dot")
        assert (tmp_path / "plan.dot").read_text() == to_dot(late)

    def test_without_graphviz(self, late, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match=r"install the package graphviz .* or draw into 'plan\.dot'"):
            mfpsn_fx.draw(late, tmp_path / "plan.svg")
        assert not list(tmp_path.iterdir())
        mfpsn_fx.draw(late, str(tmp_path / "plan.dot"))

    @pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
    @pytest.mark.parametrize(("kind", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
    def test_pictures(self, late, tmp_path, kind, magic):
        mfpsn_fx.draw(late, tmp_path / f"plan.{kind}")
        assert (tmp_path / f"plan.{kind}").read_bytes().startswith(magic)

    def test_graphviz_that_fails(self, late, tmp_path, monkeypatch):
        program = tmp_path / "dot"
        program.write_text("#!/bin/sh\necho no fonts >&2\nexit 3\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        with pytest.raises(RuntimeError, match=r"could not draw 'plan\.svg': no fonts"):
            mfpsn_fx.draw(late, tmp_path / "plan.svg")
        assert not (tmp_path / "plan.svg").exists()

    def test_other_names(self, late, tmp_path):
        with pytest.raises(ValueError, match=r"'plan\.jpeg': its name must end in \.svg, \.png, \.pdf, \.dot, \.gv"):
            mfpsn_fx.draw(late, tmp_path / "plan.jpeg")


class _Cells(html.parser.HTMLParser):
    """Texts by the tag that they stand in."""

    def __init__(self):
        super().__init__()
        self.open, self.found = [], {}

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.found.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.found[self.open[-1]][-1] += data


class TestStyles:
    @pytest.fixture
    def table(self):
        row = Row(
            "a", "LIFNode", (2, 3), 2, 1, "time_first", "k|1", "k|1", 1.0, 2.0, 0.5, 3.0, ("<b>bold</b> & | bar",)
        )
        return Selection((row,), conversions=1, unconverted=(("left", "is <not> a filter"),))

    def test_plain_is_the_default(self, table, capsys):
        assert table.table() == table.table("plain") == str(table)
        assert "not converted: left: is <not> a filter" in table.table().splitlines()
        model = converted("time_first")
        mfpsn_fx.print_selection(model)
        assert capsys.readouterr().out == f"{mfpsn_fx.selection(model).table('plain')}\n"

    def test_markdown(self, table):
        lines = table.table("github").splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]}) == 1
        assert r"k\|1" in lines[2]
        assert r"& \| bar" in lines[2]
        assert lines[3] == ""
        assert all(line.startswith("- ") for line in lines[4:])
        assert lines[-1] == "- not converted: left: is <not> a filter"

    def test_html(self, table):
        seen = _Cells()
        seen.feed(table.table("html"))
        assert not seen.open
        cells = [cell.strip() for cell in seen.found["td"]]
        assert cells[0] == "a"
        assert cells[-1] == "<b>bold</b> & | bar"
        assert "b" not in seen.found
        assert [item.strip() for item in seen.found["li"]][-1] == "not converted: left: is <not> a filter"
        assert table._repr_html_() == table.table("html")

    def test_unknown(self, table):
        with pytest.raises(ValueError, match="unknown style 'markdwon': choose 'plain', 'github' or 'html'"):
            table.table("markdwon")
