"""The .ts format, in which the time series archives keep their data: a header of @tags, then one case a line.

A case is its dimensions, separated by colons, each a list of comma-separated numbers; with ``@classLabel true`` the
class stands behind the last colon. Lines that begin with # are comments, tags are read in any case.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import torch
from torch import Tensor

__all__ = ["TimeSeries", "TsFormatError", "read_ts"]


class TsFormatError(ValueError):
    """A file that is not in the format; the message names the file, the line, what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class TimeSeries:
    """What a file holds.

    Attributes:
        name: ``@problemName``.
        classes: the class names in the order of the header; empty without labels.
        cases: one (steps, dimensions) float64 tensor a case, NaN where a value is missing.
        labels: (cases,) of int64, indices into ``classes``; None without labels.
    """

    name: str
    classes: tuple[str, ...]
    cases: list[Tensor]
    labels: Tensor | None


@dataclasses.dataclass
class _Header:
    name: str = ""
    missing: bool = True  # a file that does not say may hold gaps
    univariate: bool | None = None
    dimensions: int | None = None
    equal_length: bool | None = None
    series_length: int | None = None
    labeled: bool = False
    classes: tuple[str, ...] = ()


_BOOLEANS = {"true": True, "false": False}


def read_ts(path: str | pathlib.Path) -> TimeSeries:
    """Read a file of series with or without class labels, of equal or varying lengths.

    Raises:
        TsFormatError: the file is not in the format, contradicts its own header, or uses a part of the format that is
            not read here (time stamps, a target to regress).
        OSError: it cannot be opened.
    """
    header, cases, labels, in_data = _Header(), [], [], False
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                if in_data:
                    case, label = _case(text, header)
                    if cases and case.shape[1] != cases[0].shape[1]:
                        raise TsFormatError(
                            f"{case.shape[1]} dimensions, but the cases before have {cases[0].shape[1]}"
                        )
                    if header.equal_length and cases and len(case) != len(cases[0]):
                        raise TsFormatError(f"{len(case)} steps, but @equalLength is true and the first case has "
                                            f"{len(cases[0])}")  # fmt: skip
                    cases.append(case)
                    labels.append(label)
                elif text.startswith("@"):
                    in_data = _tag(text[1:], header)
                else:
                    raise TsFormatError("data before the @data tag")
            except TsFormatError as error:
                raise TsFormatError(f"{path}, line {number}: {error}") from None
    if not in_data:
        raise TsFormatError(f"{path}: there is no @data tag")
    if not cases:
        raise TsFormatError(f"{path}: there is no case behind @data")
    return TimeSeries(header.name, header.classes, cases, torch.tensor(labels) if header.labeled else None)


def _tag(text: str, header: _Header) -> bool:
    """Put one tag into ``header``; whether it was @data."""
    tag, *values = text.split()
    match tag.lower():
        case "data":
            if header.labeled and not header.classes:
                raise TsFormatError("@classLabel true names no classes")
            return True
        case "problemname":
            header.name = " ".join(values)
        case "timestamps":
            if _boolean(tag, values):
                raise TsFormatError("@timeStamps true is not read here: series must be sampled at equal steps")
        case "targetlabel":
            if _boolean(tag, values[:1]):
                raise TsFormatError("@targetLabel true is not read here: only class labels are")
        case "missing":
            header.missing = _boolean(tag, values)
        case "univariate":
            header.univariate = _boolean(tag, values)
        case "dimensions" | "dimension":
            header.dimensions = _integer(tag, values)
        case "equallength":
            header.equal_length = _boolean(tag, values)
        case "serieslength":
            header.series_length = _integer(tag, values)
        case "classlabel":
            header.labeled = _boolean(tag, values[:1])
            header.classes = tuple(values[1:])
        case _:
            raise TsFormatError(f"unknown tag @{tag}")
    return False


def _boolean(tag: str, values: list[str]) -> bool:
    if len(values) != 1 or values[0].lower() not in _BOOLEANS:
        raise TsFormatError(f"@{tag} takes true or false, found {' '.join(values) or 'nothing'}")
    return _BOOLEANS[values[0].lower()]


def _integer(tag: str, values: list[str]) -> int:
    if len(values) != 1 or not values[0].isdecimal() or int(values[0]) < 1:
        raise TsFormatError(f"@{tag} takes a positive integer, found {' '.join(values) or 'nothing'}")
    return int(values[0])


def _case(text: str, header: _Header) -> tuple[Tensor, int]:
    """One line: (steps, dimensions) and the index of its class (−1 without labels)."""
    *series, label = text.split(":") if header.labeled else (*text.split(":"), "")
    if header.labeled and label.strip() not in header.classes:
        raise TsFormatError(f"class {label.strip()!r} is none of @classLabel's: {' '.join(header.classes)}")
    if not series:
        raise TsFormatError("no dimension")
    if header.univariate and len(series) != 1:
        raise TsFormatError(f"{len(series)} dimensions, but @univariate is true")
    if header.dimensions is not None and len(series) != header.dimensions:
        raise TsFormatError(f"{len(series)} dimensions, but @dimensions says {header.dimensions}")
    values = [[_number(value, header) for value in one.split(",")] for one in series]
    if len(lengths := sorted({len(one) for one in values})) != 1:
        raise TsFormatError(f"dimensions of different lengths: {', '.join(map(str, lengths))} steps")
    if header.series_length is not None and lengths[0] != header.series_length and header.equal_length is not False:
        raise TsFormatError(f"{lengths[0]} steps, but @seriesLength says {header.series_length}")
    return (
        torch.tensor(values, dtype=torch.float64).T.contiguous(),
        header.classes.index(label.strip()) if header.labeled else -1,
    )


def _number(text: str, header: _Header) -> float:
    text = text.strip()
    try:
        value = math.nan if text == "?" else float(text)
    except ValueError:
        raise TsFormatError(f"{text!r} is no number") from None
    if math.isnan(value) and not header.missing:
        raise TsFormatError("a value is missing, but @missing is false")
    return value
