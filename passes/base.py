"""Base class of passes, and the pipeline that runs passes in order."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Iterator

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .context import PassContext
from .errors import PipelineError
from .options import ConvertOptions, MeasureOptions

__all__ = ["Pass", "Pipeline", "Result"]

_log = logging.getLogger("mfpsn_fx")


class Result(PassResult):
    """A graph module, a flag that is true if it was modified, and a line for each change."""

    changes: tuple[str, ...]

    def __new__(cls, graph_module: fx.GraphModule, changes: Iterable[str] = ()) -> Result:
        changes = tuple(changes)
        self = super().__new__(cls, graph_module, bool(changes))
        self.changes = changes
        return self


class Pass(PassBase):
    """One graph rewrite, a ``torch.fx`` pass that takes a GraphModule and returns one.

    A subclass gives ``name``, ``call(gm, context) -> Result``, a docstring with the graph before and after, what it
    ``needs`` from passes before it, and what it ``gives`` to passes after it. It reads ``context.options``, and keeps
    no state of a network, so that one instance serves any network. FX's pass manager runs it with an empty context.

    Args:
        options: options by name that override the context's; those that are None do not.

    Raises:
        TypeError, ValueError: there is no such option, or it does not take the value.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    def __init__(self, **options: object) -> None:
        self.overrides = {name: value for name, value in options.items() if value is not None}
        ConvertOptions().replace(**self.overrides)

    def __call__(self, gm: fx.GraphModule, context: PassContext | None = None) -> Result:
        """Run the pass on ``gm``.

        Args:
            gm: the graph, changed in place.
            context: the example, the options and the results of earlier passes; None: an empty context.
        """
        context = PassContext() if context is None else context
        given, options = context.options, context.options or ConvertOptions()
        if not isinstance(options, ConvertOptions):  # of which a pass may read any
            options = ConvertOptions(**vars(options))
        context.options = options.replace(**vars(self).get("overrides", {}))
        try:
            self.requires(gm)
            result = self.call(gm, context)
            self.ensures(gm)
        finally:
            context.options = given
        return result

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        raise TypeError(f"{type(self).__name__} does not define call(gm, context)")

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if isinstance(value, (str, int, float, bool))}
        return (
            f"{self.name}({', '.join(f'{k}={v!r}' for k, v in (settings | vars(self).get('overrides', {})).items())})"
        )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order, immutable: take it apart with ``[...]`` or ``list``, and build another.

    Args:
        passes: :class:`Pass` instances, or functions of a GraphModule alone, which they change in place or return.
        given: what the graph offers before the first pass, e.g. ``("neurons",)`` for a converted one.
        options: the options where the context has none.

    Raises:
        PipelineError: a pass needs what neither ``given`` nor an earlier pass gives.

    With the environment variable ``MFPSN_FX_DEBUG`` set to a folder, the graph before and after each pass, its time,
    and what it changed are written there.
    """

    passes: tuple[Pass, ...]
    given: tuple[str, ...] = ()
    # its mappings are not hashable
    options: MeasureOptions | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "given", tuple(self.given))
        known, faults = set(self.given), []
        for index, one in enumerate(self.passes):
            if not callable(one):
                faults.append(f"{index}: {one!r} is not callable")
                continue
            for need in getattr(one, "needs", ()):
                if need not in known:
                    later = [_name(p) for p in self.passes[index + 1 :] if need in getattr(p, "gives", ())]
                    hint = f"; move it after {later[0]}" if later else "; no pass in the pipeline gives it"
                    faults.append(f"{index}: {_name(one)} needs {need!r}, which nothing before it gives{hint}")
            known.update(getattr(one, "gives", ()))
        if faults:
            raise PipelineError("this pipeline cannot run:\n  " + "\n  ".join(faults))

    def __call__(self, gm: fx.GraphModule, context: PassContext | None = None) -> fx.GraphModule:
        """Run all passes on ``gm`` and return the graph that the last one returns.

        Args:
            gm: the graph, changed in place.
            context: the example, the options, and the results that passes hand to each other.
        """
        context = PassContext() if context is None else context
        if context.options is None:
            context.options = self.options or ConvertOptions()
        folder = os.environ.get("MFPSN_FX_DEBUG")
        for index, one in enumerate(self.passes):
            before = _graph_text(gm) if folder else ""
            started = time.perf_counter()
            result = one(gm, context) if isinstance(one, (Pass, Pipeline)) else one(gm)
            seconds = time.perf_counter() - started
            gm = gm if result is None else getattr(result, "graph_module", result)
            changes = getattr(result, "changes", ())
            _log.debug("pass %s: %d changes in %.3f s", _name(one), len(changes), seconds)
            if folder:
                _dump(pathlib.Path(folder), index, _name(one), before, _graph_text(gm), seconds, changes)
        return gm

    def __getitem__(self, index):
        return self.passes[index]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def without(self, name: str) -> Pipeline:
        """Return the pipeline without the passes called ``name``; ``ValueError`` if there is none."""
        self._index(name)
        return dataclasses.replace(self, passes=[p for p in self.passes if _name(p) != name])

    def inserted(self, new: Pass, *, before: str | None = None, after: str | None = None) -> Pipeline:
        """Return the pipeline with ``new`` before or after the pass of that name, or at the end."""
        if before is not None and after is not None:
            raise ValueError("give before or after, not both")
        at = len(self) if before is None and after is None else self._index(before or after) + (after is not None)
        return dataclasses.replace(self, passes=[*self.passes[:at], new, *self.passes[at:]])

    def replaced(self, name: str, new: Pass) -> Pipeline:
        """Return the pipeline with ``new`` in place of the pass called ``name``."""
        at = self._index(name)
        return dataclasses.replace(self, passes=[*self.passes[:at], new, *self.passes[at + 1 :]])

    def _index(self, name: str) -> int:
        names = [_name(p) for p in self.passes]
        if name not in names:
            raise ValueError(f"no pass called {name!r}; there are {', '.join(map(repr, names))}")
        return names.index(name)

    def __str__(self) -> str:
        lines = []
        for index, one in enumerate(self.passes):
            doc = (one.__doc__ or "").strip().splitlines()
            needs, gives = getattr(one, "needs", ()), getattr(one, "gives", ())
            lines.append(f"{index}  {_name(one):<20} {doc[0] if doc else ''}")
            if needs or gives:
                lines.append(f"   {'':<20} needs: {', '.join(needs) or '-'}; gives: {', '.join(gives) or '-'}")
        return "\n".join(lines)


def _name(one: object) -> str:
    return getattr(one, "name", "") or getattr(one, "__name__", type(one).__name__)


def _graph_text(gm: fx.GraphModule) -> str:
    modules = [f"# {path}: {type(m).__name__}({m.extra_repr()})" for path, m in gm.named_modules() if path]
    return "\n".join([str(gm.graph), "", gm.code, *modules, ""])


def _dump(
    folder: pathlib.Path, index: int, name: str, before: str, after: str, seconds: float, changes: Iterable[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{index:02d}_{name.replace(' ', '_')}"
    (folder / f"{stem}.before.txt").write_text(before, encoding="utf-8")
    (folder / f"{stem}.after.txt").write_text(after, encoding="utf-8")
    lines = [f"time: {seconds:.6f} s", *(f"changed: {line}" for line in changes)]
    (folder / f"{stem}.changes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
