"""The op's constants: schemas made from them, calls made and read, keys, what is checked."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pathlib
import pickle

import pytest
import torch
from torch import fx

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import Layout, NeuronConstants, Problem, neuron
from mfpsn_fx.kernels.autotune.buffers import Pool
from mfpsn_fx.kernels.autotune.neuron_race import kernel_race
from mfpsn_fx.kernels.build import cpu as cpu_build
from mfpsn_fx.kernels.constants import ALL, COMMON, FOLDING, SURROGATE, bind
from mfpsn_fx.passes import neurons

OPS = torch.ops.mfpsn
KERNELS = pathlib.Path(cpu_build.__file__).parents[1]
FIELDS = dataclasses.fields(NeuronConstants)
OTHERS = {
    "eps": 1e-3, "surrogate": "sigmoid", "alpha": 3.5, "gradient": "round-only", "min_exponent": -7, "max_exponent": 4,
    "training": True, "dilation": 3, "layout": "time_last", "method": "shifted-add", "layer": "net.lif",
}  # fmt: skip
TENSORS = ("x", "weight", "gamma", "beta", "running_mean", "running_var")


def described(arguments):
    return [(str(a.type), a.name, a.default_value) for a in arguments]


def wanted(names, cls=NeuronConstants):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return [(fields[name].type, name, fields[name].default) for name in names]


class TestSchema:
    @pytest.mark.parametrize(
        ("op", "names"),
        [
            ("neuron", [field.name for field in FIELDS]),
            ("neuron_backward", [field.name for field in FIELDS]),
            ("statistics", COMMON),
            ("fire", COMMON),
            ("backward_reductions", SURROGATE + COMMON),
            ("backward_input", SURROGATE + COMMON),
        ],
    )
    def test_ops_take_the_fields_in_their_order(self, op, names):
        keywords = [a for a in getattr(OPS, op).default._schema.arguments if a.kwarg_only]
        assert described(a for a in keywords if a.name != "input_grad") == wanted(names)

    @pytest.mark.parametrize("op", ["statistics", "fire", "backward_reductions", "backward_input", "forward", "layer"])
    def test_the_cpp_librarys_operators_take_some_of_the_fields(self, op):
        """The order is that of the fields; that the C++ functions take these types, torch checks on loading."""
        arguments = getattr(torch.ops.mfpsn_cpu, op).default._schema.arguments
        names = [a.name for a in arguments if a.has_default_value()]
        assert len(names) >= 2
        assert names == [name for name in ALL if name in names]
        assert described(a for a in arguments if a.has_default_value()) == wanted(names)

    def test_a_field_more_or_another_order_is_in_the_schema(self):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class More(NeuronConstants):
            decay: float = 0.25

        assert "decay" in More().key()
        for names in ([*ALL, "decay"], [*reversed(ALL), "decay"]):
            schema = torch._C.parse_schema(f"probe::op(Tensor x, *, {More.schema(names)}) -> Tensor")
            assert described(schema.arguments[1:]) == wanted(names, More)
            assert list(More(decay=0.5).arguments(names).items())[-1] == ("decay", 0.5)


class TestCalls:
    def graph(self, constants, by_name=False, target=neuron):
        graph = fx.Graph()
        tensors = {name: graph.placeholder(name) for name in (*TENSORS, "mask")}
        mask = tensors.pop("mask")
        args = () if by_name else (*tensors.values(), None, None, mask)
        named = {**tensors, "mask": mask} if by_name else {}
        graph.output(graph.call_function(target, args, {**named, **constants.arguments(ALL)}))
        return fx.GraphModule({}, graph)

    @pytest.mark.parametrize("by_name", [True, False])
    @pytest.mark.parametrize("target", [neuron, neuron.default])
    def test_from_constants_to_a_node_and_back(self, by_name, target):
        constants = NeuronConstants(**OTHERS)
        assert all(getattr(constants, field.name) != field.default for field in FIELDS)
        gm = self.graph(constants, by_name, target)
        for graph in (gm.graph, pickle.loads(pickle.dumps(gm)).graph, copy.deepcopy(gm).graph):
            (node,) = (node for node in graph.nodes if node.op == "call_function")
            assert NeuronConstants.of_call(node.target, node.args, node.kwargs) == constants

    @pytest.mark.parametrize("by_name", [True, False])
    def test_the_view_reads_operands_by_name(self, by_name):
        constants = NeuronConstants(**OTHERS)
        gm = self.graph(constants, by_name)
        places = {node.target: node for node in gm.graph.nodes if node.op == "placeholder"}
        places["x"].meta["example_value"] = torch.empty(2, 4, 5, 6)
        places["weight"].meta["example_value"] = torch.empty(4, 3)
        (found,) = neurons(gm)
        assert found.input is places["x"]
        assert (found.order, found.channels, found.masked, found.affine) == (3, 4, True, False)
        assert found.constants == constants
        assert found.problem() == Problem(
            (2, 4, 5, 6), Layout.TIME_LAST, torch.float32, "cpu", 3, 3, "sigmoid", "round-only", masked=True
        )
        found.kernel, found.layout = "conv2d", "time_first"
        assert neurons(gm)[0].constants == dataclasses.replace(constants, method="conv2d", layout="time_first")

    def test_operands_of_a_module_are_read_by_name(self):
        module = torch.nn.Module()
        module.lif = MulFreePSN(3)
        graph = fx.Graph()
        x, mask = graph.placeholder("x"), graph.placeholder("mask")
        graph.output(graph.call_module("lif", (), {"mask": mask, "x": x}))
        (found,) = neurons(fx.GraphModule(module, graph))
        assert found.input is x
        assert found.masked
        assert not found.affine

    def test_defaults_are_filled_in(self):
        assert NeuronConstants.of_call(OPS.fire, (1, 2, 3), {"layout": "time_last"}).layout == "time_last"
        bound = bind(neuron, (1, 2, 3, 4, 5, 6), {"shift": 7})
        assert (bound["x"], bound["scale"], bound["shift"], bound["mask"], bound["alpha"]) == (1, None, 7, None, 2.0)
        with pytest.raises(TypeError, match="multiple values"):
            bind(neuron, (1, 2, 3, 4, 5, 6), {"gamma": 7})

    def test_problems_say_which_constants_they_leave_open(self):
        constants = NeuronConstants(**OTHERS)
        problem = Problem.of(constants, (2, 3, 5), torch.float32, "cpu", 2)
        assert problem.constants(constants) == constants
        left = {name for name in ALL if getattr(problem.constants(), name) == getattr(NeuronConstants(), name)}
        assert left == {"eps", "alpha", "min_exponent", "max_exponent", "method", "layer"}


def test_values_survive_copies_and_pickles():
    constants = NeuronConstants.checked(**OTHERS)
    assert constants.parsed_layout is Layout.TIME_LAST
    for other in (copy.deepcopy(constants), pickle.loads(pickle.dumps(constants)), NeuronConstants(**OTHERS)):
        assert other == constants
        assert hash(other) == hash(constants)
        assert vars(other) == OTHERS
    assert constants.arguments(FOLDING) == {name: OTHERS[name] for name in FOLDING}


def test_equal_constants_are_checked_once_and_are_one_object():
    assert NeuronConstants.checked(dilation=2) is NeuronConstants.checked(dilation=2)
    for wrong in ({"dilation": 0}, {"surrogate": "none"}, {"alpha": -1.0}, {"layout": "up"}, {"gradient": "guess"}):
        with pytest.raises(ValueError, match=r"dilation|surrogate|alpha|layout|gradient"):
            NeuronConstants.checked(**wrong)


def test_measurements_are_kept_under_every_field_but_labels():
    problem = Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)

    def key(constants):
        shared = {name: getattr(constants, name) for name in Problem._fields if name in ALL}
        asked = problem._replace(**shared | {"layout": constants.parsed_layout})
        (variant,) = kernel_race(asked, ["shifted-add"], Pool("cpu"), name="one", constants=constants).variants
        return variant.key

    plain = key(NeuronConstants())
    assert set(ALL) - set(plain) == {"layer"}
    for name in set(ALL) - {"training", "method"}:  # these two the race sets itself
        other = key(NeuronConstants(**{name: OTHERS[name]}))
        assert (other != plain) is (name != "layer"), name
    assert plain["method"] == "shifted-add"


def test_the_cpp_library_is_called_through_torch_alone():
    for module in ("implementations/fused_cpu", "build/cpu"):
        tree = ast.parse((KERNELS / f"{module}.py").read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "torch" in imported
        assert "ctypes" not in imported
    assert 'extern "C"' not in "".join(path.read_text() for path in (KERNELS / "csrc" / "cpu").iterdir())
