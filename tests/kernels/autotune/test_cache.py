"""Times that are kept: what they are kept under, what happens to damaged files, and selections that are replayed."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import pathlib
import sys
import time
import types

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.__main__ import main
from mfpsn_fx.kernels import Layout, Problem, unregister_kernel
from mfpsn_fx.kernels.autotune import cache as selection_cache
from mfpsn_fx.kernels.autotune import environment as machine
from mfpsn_fx.kernels.autotune import race as engine
from mfpsn_fx.kernels.autotune.buffers import Pool
from mfpsn_fx.kernels.autotune.cache import SelectionCache, cache_folder
from mfpsn_fx.kernels.autotune.neuron_race import conversion_race, kernel_race
from mfpsn_fx.kernels.constants import ALL, NeuronConstants
from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

CPU = torch.device("cpu")
x = torch.randn(4, 2, 3, 5)


def small() -> nn.Sequential:
    return nn.Sequential(MulFreePSN(3), nn.ReLU(), MulFreePSN(3, dilation=2))


def convert(model=None, example=x, **options):
    return mfpsn_fx.convert(model or small(), example, **{"repeats": 1, "progress": False, "budget_s": 60, **options})


@pytest.fixture
def folder(monkeypatch, tmp_path) -> pathlib.Path:
    monkeypatch.setenv("MFPSN_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_over(cache: SelectionCache, key: object, age_s: float) -> None:
    """The mark of a process that was killed ``age_s`` ago, while ``key`` was run for the first time."""
    with cache.first_run(key, CPU):
        (path,) = (path for path in cache.files() if path.name.startswith("started-"))
        data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "started": data["started"] - age_s}))


@pytest.fixture
def samples(monkeypatch) -> list[str]:
    """Grows with every sample that is taken."""
    taken, real = [], engine.sample
    monkeypatch.setattr(engine, "sample", lambda run, *rest: taken.append("one") or real(run, *rest))
    return taken


class TestKept:
    def test_a_resnet_is_measured_once(self, samples):
        net = spiking_resnet.spiking_resnet18(spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan())
        functional.set_step_mode(net, "m")
        images = torch.randn(4, 2, 3, 32, 32)
        first = convert(net, images)
        assert len(samples) > 100
        samples.clear()
        second = convert(net, images)
        assert samples == []
        before, after = mfpsn_fx.selection(first), mfpsn_fx.selection(second)
        assert [(r.layer, r.layout, r.kernel, r.eval_kernel) for r in before.rows] == [
            (r.layer, r.layout, r.kernel, r.eval_kernel) for r in after.rows
        ]
        assert (after.measured, after.kept) == (0, before.measured)
        assert after.noise == before.noise
        assert f"nothing measured, {before.measured} known from earlier" in str(after)

    def test_what_is_asked_for_beyond_is_measured(self, samples):
        convert()
        for options, again in (
            ({}, False),
            ({"layout": "time_first"}, False),
            ({"budget_s": 1e4}, False),
            ({"repeats": 2}, True),
            ({"repeats": 1}, False),
            ({"example": torch.randn(4, 2, 3, 6)}, True),
            ({"example": x.double(), "model": small().double()}, True),
            ({"example": x.transpose(2, 3).contiguous().transpose(2, 3)}, True),
            ({"cache": False}, True),
        ):
            samples.clear()
            convert(**options)
            assert bool(samples) is again, options

    def test_selections_are_equal(self):
        """Measured, and known from earlier: to the last bit of every time."""
        first, second = (mfpsn_fx.selection(convert(repeats=2)) for _ in range(2))
        assert first == second
        assert (second.measured, second.kept) == (0, first.measured)

    def test_more_time_than_was_short(self, samples):
        table = mfpsn_fx.selection(convert(budget_s=0))
        assert {row.kernel for row in table.rows} == {MulFreePSN(3).default_kernel()}
        assert "not reached within the budget: " in table.rows[0].notes[-1]
        assert "vmap-mm (time_last)" in table.rows[0].notes[-1]
        samples.clear()
        convert(budget_s=0)
        assert not samples
        convert(budget_s=10)
        assert samples
        samples.clear()
        convert(budget_s=0)  # what is enough by now
        assert not samples

    def test_a_kernel_that_fails_is_not_tried_again(self, samples):
        tries = []

        @mfpsn_fx.register_kernel("fails")
        class Fails(ShiftedAdd):
            def filter(self, call, x, w):
                tries.append(1)
                raise RuntimeError("out of luck")

        try:
            for _ in range(2):
                table = str(mfpsn_fx.selection(convert()))
                assert "fails failed in time_first: RuntimeError: out of luck" in table
                count, tries[:] = len(tries), []
                assert (count > 0) is bool(samples)
                samples.clear()
        finally:
            unregister_kernel("fails")

    def test_switched_off(self, monkeypatch, samples, folder):
        convert(cache=False)
        assert not folder.exists()
        monkeypatch.setenv("MFPSN_FX_CACHE", "off")
        for _ in range(2):
            samples.clear()
            convert()
            assert samples


class TestKeys:
    def paths(self, folder, **changes):
        problem = Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)._replace(
            **{k: v for k, v in changes.items() if k in Problem._fields}
        )
        constants = NeuronConstants(**{k: v for k, v in changes.items() if k in ALL})
        strides = changes.get("strides")
        race = kernel_race(problem, ["shifted-add"], Pool("cpu"), name="one", constants=constants, strides=strides)
        SelectionCache(folder).put(race.key, CPU, {})
        return {path.name for path in SelectionCache(folder).files()}

    def test_every_attribute_counts(self, tmp_path):
        count = len(self.paths(tmp_path))
        for changes in (
            {"shape": (4, 3, 3)}, {"strides": (3, 12, 1)}, {"dtype": torch.bfloat16}, {"layout": Layout.TIME_LAST},
            {"order": 3}, {"dilation": 2}, {"surrogate": "sigmoid"}, {"alpha": 3.0}, {"gradient": "none"},
            {"masked": True}, {"affine": True}, {"shape": (1, 1, 3)}, {"eps": 1e-3}, {"min_exponent": -4},
            {"max_exponent": 4},
        ):  # fmt: skip
            assert len(self.paths(tmp_path, **changes)) == count + 1, changes
            count += 1
        race = conversion_race((4, 2, 3), torch.float32, Pool("cpu"), name="one")
        SelectionCache(tmp_path).put(race.key, CPU, {})
        assert len(SelectionCache(tmp_path).files()) == count + 1

    def test_the_machine_counts(self, tmp_path, monkeypatch):
        cache = SelectionCache(tmp_path)
        cache.put("key", CPU, {"a": 1})
        assert cache.get("key", CPU) == {"a": 1}
        facts = machine.machine(CPU)
        assert {"cpu", "threads", "torch", "triton", "cuda", "sources"} <= set(facts)
        for name in facts:
            monkeypatch.setattr(
                "mfpsn_fx.kernels.autotune.cache.machine", lambda device, name=name: {**facts, name: "other"}
            )
            assert cache.get("key", CPU) is None, name

    def test_threads(self, one_thread, tmp_path):
        cache = SelectionCache(tmp_path)
        torch.set_num_threads(2)
        cache.put("key", CPU, {})
        torch.set_num_threads(1)
        assert cache.get("key", CPU) is None

    def test_our_sources(self, tmp_path, monkeypatch):
        before = machine.sources_hash()
        assert machine.sources_hash.__wrapped__() == before
        monkeypatch.setattr(machine, "_PACKAGE", tmp_path)
        hashes = {before}
        files = ("a.py", "csrc/a.cu", "csrc/cpu/a.h", "implementations/a.py")  # however deep they stand
        for file, text in ((file, text) for file in files for text in "12"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
            hashes.add(machine.sources_hash.__wrapped__())
        (tmp_path / "a.py").rename(tmp_path / "csrc" / "a.py")
        hashes.add(machine.sources_hash.__wrapped__())
        assert len(hashes) == 1 + 8 + 1
        (tmp_path / "__pycache__").mkdir()
        (tmp_path / "__pycache__" / "a.pyc").write_text("1")
        assert machine.sources_hash.__wrapped__() in hashes

    def test_a_kernel_of_the_users(self, folder, samples):
        """Measured again when its source is another; not kept where that cannot be read."""

        def one():
            class Mine(ShiftedAdd):
                """One."""

            return Mine

        def two():
            class Mine(ShiftedAdd):
                """Another."""

            return Mine

        names: dict = {"ShiftedAdd": ShiftedAdd, "__name__": "nowhere"}
        exec("class Mine(ShiftedAdd):\n    pass", names)
        for cls, again in ((one(), True), (one(), False), (two(), True), (two(), False), (names["Mine"], True)):
            mfpsn_fx.register_kernel("mine")(cls)
            samples.clear()
            convert()
            unregister_kernel("mine")
            assert bool(samples) is again
        mfpsn_fx.register_kernel("mine")(names["Mine"])
        files = SelectionCache(folder).files()
        convert()
        unregister_kernel("mine")
        assert SelectionCache(folder).files() == files


def _write(folder: str, name: str) -> None:
    cache = SelectionCache(pathlib.Path(folder))
    for index in range(150):
        cache.put("key", CPU, {"who": name, "index": index, "long": [name] * 500})


class TestFaults:
    def damage(self, path: pathlib.Path, how: str) -> None:
        text = path.read_text()
        data = json.loads(text)
        if how == "truncated":
            path.write_text(text[: len(text) // 2])
        elif how == "empty":
            path.write_text("")
        elif how == "binary":
            path.write_bytes(b"\x80\x04\xff\x00")
        elif how == "a list":
            path.write_text("[]")
        elif how == "another version":
            path.write_text(json.dumps({**data, "format": 99}))
        elif how == "another key":
            path.write_text(json.dumps({**data, "key": {"what": 1}}))
        elif how == "nested":
            path.write_text("[" * 100_000)
        else:
            outcome = next(iter(data["record"].values()))
            if how == "no samples":
                outcome["samples"] = {}
            elif how == "infinite":
                outcome["samples"] = {part: [float("inf")] for part in outcome["samples"]}
            elif how == "not counted":
                del outcome["thin"]
            elif how == "words":
                outcome["samples"] = {part: ["fast"] for part in outcome["samples"]}
            elif how == "no variants":
                data["record"] = {}
            path.write_text(json.dumps(data))

    @pytest.mark.parametrize(
        "how",
        ["truncated", "empty", "binary", "a list", "another version", "another key", "nested", "no samples", "infinite",
         "words", "no variants", "not counted"],
    )  # fmt: skip
    def test_damaged_files_are_replaced_with_one_warning(self, how, folder, caplog, samples):
        options = {"layout": "time_first", "kernels": "shifted-add"}
        convert(**options)
        files = SelectionCache(folder).files()
        assert len(files) > 1
        for path in files:
            self.damage(path, how)
        samples.clear()
        convert(**options)
        assert samples
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "measuring again" in warnings[0]
        assert str(folder) in warnings[0]
        samples.clear()
        convert(**options)
        assert not samples
        assert SelectionCache(folder).files() == files
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
    @pytest.mark.parametrize("where", ["tempfile.mkstemp", "os.replace", "json.dump", "pathlib.Path.mkdir"])
    def test_what_cannot_be_written_is_not_kept_with_one_warning(self, code, where, monkeypatch, folder, caplog):
        def fail(*args, **kwargs):
            raise OSError(code, "no such luck")

        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            model = convert(kernels="shifted-add")
        assert model(x)[0].shape == x[0].shape
        assert [r.getMessage() for r in caplog.records] == [
            f"times cannot be cached in {folder} ([Errno {code}] no such luck): continuing without"
        ]
        assert not folder.exists() or list(folder.iterdir()) == []

    def test_a_folder_that_is_none(self, folder, caplog):
        folder.write_text("a file")
        convert(kernels="shifted-add")
        assert all("cannot be read" in m or "cannot be cached" in m for m in caplog.messages)
        assert 1 <= len(caplog.records) <= 2
        assert folder.read_text() == "a file"

    def test_two_processes_write_at_once(self, tmp_path):
        """Every file is whole at any time, and none is left over."""
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        writers = [context.Process(target=_write, args=(str(tmp_path), name)) for name in "ab"]
        for writer in writers:
            writer.start()
        cache, seen = SelectionCache(tmp_path), set()
        while any(writer.is_alive() for writer in writers):
            if (record := cache.get("key", CPU)) is not None:
                assert record["long"] == [record["who"]] * 500
                seen.add(record["who"])
        assert [writer.exitcode for writer in writers] == [0, 0]
        assert cache._warned == set()
        assert len(list(tmp_path.iterdir())) == 1
        assert cache.get("key", CPU)["index"] == 149

    def test_a_first_run_is_marked_while_it_runs(self, tmp_path):
        cache = SelectionCache(tmp_path)

        def interrupted():
            with cache.first_run("key", CPU):
                assert len(cache.files()) == 1
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert cache.files() == []

    def test_a_mark_of_two_minutes_is_that_of_a_process_that_was_killed(self, tmp_path, monkeypatch):
        now = [1e9]
        monkeypatch.setattr(
            selection_cache,
            "time",
            types.SimpleNamespace(time=lambda: now[0], strftime=time.strftime, localtime=time.localtime),
        )
        cache = SelectionCache(tmp_path)
        left_over(cache, "key", 100)
        assert cache.unfinished("key", CPU) is None  # another process may be running it
        with cache.first_run("key", CPU):  # the mark keeps its age
            now[0] += 30
            assert "did not return: it hangs, or ends its process" in cache.unfinished("key", CPU)
            assert cache.unfinished("other", CPU) is None
        assert cache.unfinished("key", CPU) is None
        assert cache.files() == []

    def test_unreadable_marks_are_no_marks(self, tmp_path):
        cache = SelectionCache(tmp_path)
        left_over(cache, "key", 300)
        (path,) = cache.files()
        path.write_text("{")
        assert cache.unfinished("key", CPU) is None


class TestFolder:
    @pytest.mark.parametrize(
        ("platform", "variables", "expected"),
        [
            ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/mfpsn_fx/selections"),
            ("linux", {}, "/home/me/.cache/mfpsn_fx/selections"),
            ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/me/Library/Caches/mfpsn_fx/selections"),
            ("win32", {"LOCALAPPDATA": "/local"}, "/local/mfpsn_fx/selections"),
            ("linux", {"MFPSN_FX_CACHE": "~/mine"}, "/home/me/mine"),
            ("linux", {"MFPSN_FX_CACHE": "OFF"}, None),
        ],
    )
    def test_is_the_platforms(self, platform, variables, expected, monkeypatch):
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "MFPSN_FX_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "platform", platform)
        for name, value in {"HOME": "/home/me", **variables}.items():
            monkeypatch.setenv(name, value)
        assert cache_folder() == (None if expected is None else pathlib.Path(expected))

    def test_command_line(self, folder, capsys, monkeypatch):
        assert main(["cache"]) == 0
        assert f"{folder}: 0 records of times" in capsys.readouterr().out
        convert(kernels="shifted-add", layout="time_first")
        left_over(SelectionCache(folder), "key", 300)
        (folder / "mine.txt").write_text("not ours")
        assert main(["cache"]) == 0
        assert "2 records of times, 1 kernels that did not return" in capsys.readouterr().out
        assert main(["cache", "--clear"]) == 0
        assert "removed 3 files" in capsys.readouterr().out
        assert [path.name for path in folder.iterdir()] == ["mine.txt"]
        monkeypatch.setenv("MFPSN_FX_CACHE", "off")
        assert main(["cache"]) == 0
        assert "not kept" in capsys.readouterr().out


class TestReplay:
    @pytest.fixture
    def chosen(self, distorted):
        """Time-last, with other kernels in evaluation than in training; then nothing may be measured any more."""

        def times(problem, name):
            late = problem.layout == "time_last"
            return [1.0, 1.0, 9.0] if late and name == "conv2d" else [9.0, 9.0, 1.0 if name == "vmap-mm" else 9.0]

        distorted(times)
        table = mfpsn_fx.selection(convert())
        assert {(r.layout, r.kernel, r.eval_kernel) for r in table.rows} == {("time_last", "conv2d", "vmap-mm")}

        def never(problem, name):
            raise AssertionError("measured")

        distorted(never)
        return table

    @pytest.mark.parametrize("form", ["object", "text", "path"])
    def test_every_form_gives_the_same_network(self, form, chosen, tmp_path, caplog):
        path = tmp_path / "selection.json"
        path.write_text(chosen.to_json())
        given = {"object": chosen, "text": chosen.to_json(), "path": path}[form]
        model = convert(selection=given)
        again = mfpsn_fx.selection(model)
        for old, new in zip(chosen.rows, again.rows, strict=True):
            assert (old.layer, old.layout, old.kernel, old.eval_kernel) == (
                new.layer,
                new.layout,
                new.kernel,
                new.eval_kernel,
            )
            assert (old.forward_ms, old.backward_ms, old.eval_ms) == (new.forward_ms, new.backward_ms, new.eval_ms)
        assert again.conversions == chosen.conversions
        assert caplog.records == []
        plain = small()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
        mfpsn_fx.plan(model, x, selection=str(path) if form == "path" else given, progress=False)
        assert [r.kernel for r in mfpsn_fx.selection(model).rows] == ["conv2d", "conv2d"]

    def test_layers_that_do_not_fit_are_named_and_measured(self, distorted, caplog):
        distorted(lambda problem, name: [1.0 if name == "vmap-mm" else 9.0] * 3)
        data = json.loads(mfpsn_fx.selection(convert(layout="time_first")).to_json())
        first, second = data["rows"]
        distorted(lambda problem, name: [2.0 if name == "fused-cpp" else 9.0] * 3)
        for changes, message in (
            ({"layer": "9"}, "0: the selection does not have it"),
            ({"order": 3}, "0: k = 3 in the selection, 2 here"),
            ({"dilation": 3}, "0: d = 3 in the selection, 1 here"),
            ({"shape": [4, 7, 3, 5]}, r"0: input of shape (4, 7, 3, 5) in the selection, (4, 2, 3, 5) here"),
            ({"kernel": "better"}, "0: unknown kernel 'better'"),
            ({"kernel": "conv2d"}, "0: kernel 'conv2d' serves time_last, not time_first"),
            ({"layout": "sideways"}, "0: unknown layout 'sideways'"),
            ({"eval_ms": None}, "0: the selection has no times for it"),
        ):
            caplog.clear()
            data["rows"] = [{**first, **changes}, second]
            rows = mfpsn_fx.selection(convert(selection=json.dumps(data))).rows
            assert [row.kernel for row in rows] == ["fused-cpp", "vmap-mm"], changes
            texts = [record.getMessage() for record in caplog.records]
            assert texts[0].startswith("the selection does not fit these layers, which are measured here:\n")
            assert message in texts[0]
            assert "\n  2:" not in texts[0]
            assert ["9" in text for text in texts[1:]] == [True] * ("layer" in changes)

    def test_what_is_no_selection(self, chosen, tmp_path):
        (tmp_path / "bad.json").write_text("{")
        (tmp_path / "binary").write_bytes(b"\xff\xfe")
        for given, error, message in (
            ("{}", ValueError, "this is not a selection written by to_json"),
            (tmp_path / "bad.json", ValueError, "this is not a selection written by to_json"),
            (str(tmp_path / "nowhere.json"), ValueError, "neither JSON text nor a file"),
            (tmp_path / "binary", ValueError, "neither JSON text nor a file"),
            (3, TypeError, "takes a Selection, its JSON text or a path, found int"),
        ):
            with pytest.raises(error, match=message):
                convert(selection=given)
        with pytest.raises(ValueError, match="leave layout= and kernels= at 'auto'"):
            convert(selection=chosen, layout="time_last")
        with pytest.raises(ValueError, match="needs an example"):
            mfpsn_fx.convert(small(), selection=chosen)
