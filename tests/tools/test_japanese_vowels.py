"""The .ts format, and the example on real speech in small."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import sys

import pytest
import torch

import mfpsn_fx

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon, which carries the data, is missing")


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Files of examples/ import each other; on tensors this small, threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES / "japanese_vowels"))
    yield
    sys.path.remove(str(EXAMPLES / "japanese_vowels"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ts(_small):
    import ts_format

    return ts_format


@pytest.fixture(scope="module")
def example(_small):
    import japanese_vowels

    return japanese_vowels


# ---- the format

LABELED = """#Nine speakers.
#
@problemName Two Vowels
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength false
@classLabel true a b
@data
1.5,2,-3e-1:0,0.25,4:a

5:6:b
# behind the data too
7,8:9,10:a
"""


def written(tmp_path, text):
    (tmp_path / "small.ts").write_text(text, encoding="utf-8")
    return tmp_path / "small.ts"


def test_labeled_series_of_varying_lengths(ts, tmp_path):
    found = ts.read_ts(written(tmp_path, LABELED))
    assert found.name == "Two Vowels"
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 1, 0]
    assert [case.tolist() for case in found.cases] == [
        [[1.5, 0], [2, 0.25], [-0.3, 4]],
        [[5, 6]],
        [[7, 9], [8, 10]],
    ]
    assert all(case.dtype is torch.float64 for case in found.cases)


def test_unlabeled_series_with_gaps(ts, tmp_path):
    text = "@PROBLEMNAME gaps\n@univariate TRUE\n@equalLength true\n@seriesLength 3\n@classLabel false\n@DATA\n"
    found = ts.read_ts(written(tmp_path, text + "1,?,3\n 4 , 5,NaN\n"))
    assert found.labels is None
    assert found.classes == ()
    first, second = (case.flatten().tolist() for case in found.cases)
    assert first[::2] == [1, 3]
    assert math.isnan(first[1])
    assert second[:2] == [4, 5]
    assert math.isnan(second[2])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5:6:b", "5:6:c", "line 13: class 'c' is none of @classLabel's: a b"),
        ("5:6:b", "5:b", "line 13: 1 dimensions, but @dimensions says 2"),
        ("5:6:b", "5:6,7:b", "line 13: dimensions of different lengths: 1, 2 steps"),
        ("5:6:b", "5:six:b", "line 13: 'six' is no number"),
        ("5:6:b", "5:?:b", "line 13: a value is missing, but @missing is false"),
        ("5:6:b", "5,:6,7:b", "line 13: '' is no number"),
        ("@dimensions 2", "@dimensions two", "line 7: @dimensions takes a positive integer, found two"),
        ("@missing false", "@missing", "line 5: @missing takes true or false, found nothing"),
        ("@timeStamps false", "@timeStamps true", "line 4: @timeStamps true is not read here"),
        ("@missing false", "@targetLabel true", "line 5: @targetLabel true is not read here"),
        ("@missing false", "@color red", "line 5: unknown tag @color"),
        ("@classLabel true a b", "@classLabel true", "line 10: @classLabel true names no classes"),
        ("@equalLength false", "@equalLength true", "line 13: 1 steps, but @equalLength is true and the first"),
        ("@univariate false", "@univariate true", "line 11: 2 dimensions, but @univariate is true"),
        ("@equalLength false", "@seriesLength 3", "line 13: 1 steps, but @seriesLength says 3"),
        ("@data", "", "line 11: data before the @data tag"),
        ("@dimensions 2\n", "", None),
    ],
)
def test_what_is_no_such_file(ts, tmp_path, old, new, message):
    path = written(tmp_path, LABELED.replace(old, new, 1))
    if message is None:  # dimensions need not be declared, but must agree
        assert len(ts.read_ts(path).cases) == 3
        path = written(tmp_path, LABELED.replace(old, new, 1).replace("5:6:b", "5:b"))
        message = "line 12: 1 dimensions, but the cases before have 2"
    with pytest.raises(ts.TsFormatError) as error:
        ts.read_ts(path)
    assert str(error.value).startswith(f"{path}, {message}")


def test_files_without_data(ts, tmp_path):
    header = LABELED.split("@data")[0]
    with pytest.raises(ts.TsFormatError, match="there is no @data tag"):
        ts.read_ts(written(tmp_path, header))
    with pytest.raises(ts.TsFormatError, match="there is no case behind @data"):
        ts.read_ts(written(tmp_path, f"{header}@data\n# nothing\n"))


# ---- the data


def test_missing_data_says_what_to_do(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit, match="pip install --no-deps aeon"):
        example.data_files()


@aeon
def test_the_data(example):
    train, test = example.load()
    assert "aeon" not in sys.modules
    assert train.x.shape == (29, 270, 12)
    assert test.x.shape == (29, 370, 12)
    assert torch.bincount(train.y).tolist() == [30] * 9
    assert torch.bincount(test.y).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    lengths = test.mask.sum(0)
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)
    for data in (train, test):
        assert (data.mask.long().diff(dim=0) <= 0).all()  # valid steps come first
        assert (data.x[~data.mask] == 0).all()
    torch.testing.assert_close(train.x[train.mask].mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.x[train.mask].std(0), torch.ones(12))
    rest, part = example.fold(train, 2)
    assert torch.bincount(rest.y).tolist() == [24] * 9
    assert torch.bincount(part.y).tolist() == [6] * 9


# ---- the networks


@pytest.fixture
def utterances(example):
    mask = mfpsn_fx.lengths_to_mask(torch.tensor([29, 7, 12, 20, 16]))
    x = torch.randn(29, 5, 12) * mask[..., None]
    return example.Utterances(x, mask, torch.tensor([0, 1, 2, 3, 8]))


def test_sources_differ_in_their_neurons_only(example, utterances):
    nets = [source.build(3) for source in example.SOURCES.values()]
    for net in nets:
        assert torch.equal(net.fc2.weight, nets[0].fc2.weight)
        assert example.scores(net, utterances).shape == (5, 9)


@pytest.mark.parametrize("name", ["snnTorch Leaky", "LIF", "SlidingPSN", "ours from LIF", "ours from snnTorch Leaky"])
def test_padding_is_not_heard(example, utterances, name):
    source = example.SOURCES[name.removeprefix("ours from ")].build(0)
    model = example.converted(source, utterances, calibrated=True, batch=5) if name.startswith("ours") else source
    noisy = torch.where(utterances.mask[..., None], utterances.x, torch.randn_like(utterances.x) * 10)
    for mode in (True, False):
        found = []
        for x in (utterances.x, noisy):
            model.train(mode)
            found.append(example.scores(model, example.Utterances(x, utterances.mask, utterances.y)))
            example.forget(model)
        torch.testing.assert_close(found[0], found[1])


@aeon
def test_the_example_in_small(example, tmp_path, capsys):
    files = {name: tmp_path / f"vowels.{name}" for name in ("json", "markdown", "png")}
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    example.main(["--quick", "--only", "SlidingPSN", *arguments])
    (result,) = json.loads(files["json"].read_text())
    assert result["name"] == "SlidingPSN"
    assert [len(result[course]["seconds"]) for course in ("source", "longer", "after", "first")] == [2] * 4
    assert max(result["after"]["accuracies"]) > 50  # nine speakers: chance is 11
    text = files["markdown"].read_text()
    assert "python examples/japanese_vowels/japanese_vowels.py --quick --only SlidingPSN" in text
    for row in ("| SlidingPSN | k = ", "| SlidingPSN |", "![Accuracy after conversion](vowels.png)"):
        assert row in text
    assert files["png"].read_bytes()[1:4] == b"PNG"
    assert "ours calibrated" in capsys.readouterr().out


@aeon
def test_tuning_uses_the_training_set_only(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "RATES", (5e-3,))
    train, _ = example.load()
    monkeypatch.setattr(example, "load", lambda: (train, None))
    example.main(["--tune", "--only", "PSN", "ours", "--epochs", "1", "--seeds", "1"])
    shown = capsys.readouterr().out
    assert "PSN" in shown
    assert "order = 4" in shown


def test_wrong_options(example, capsys):
    for wrong in (["--epochs", "0"], ["--batch", "500"], ["--only", "nothing"], ["--only", "ours"]):
        with pytest.raises(SystemExit):
            example.main(wrong)
    shown = capsys.readouterr().err
    assert "invalid choice" in shown
    assert "name a source" in shown
