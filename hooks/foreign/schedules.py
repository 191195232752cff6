"""Which modules loop, and how often: declared for a module of one's own, known for Ouro, Huginn, HRM-Text, ALBERT.

`hooks.foreign.watching` turns a schedule into sites. A module that no entry covers runs once per forward;
an entry with one number is a loop (``@3``), one with letters is nested cycles (``@h1.l0``).

    Schedule({"core_block": 8})                          # core_block and everything below it, wherever it stands
    Schedule({"core_block": UpTo(16)})                   # the data decide how many loops come, at most 16
    Schedule({"L_module": {"h": 2, "l": 3}, "H_module": {"h": 2}})
    schedule_of(model)                                   # known from model.config, or None

Loops are counted by the outermost module that the entry covers and that is called. What is inside it takes the number
of the call that it runs in, so that a routed expert, which runs in some loops only, is numbered rightly.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import nn

from hooks.sites import LoopAxes


@dataclass(frozen=True)
class UpTo:
    """At most ``most`` loops; how many come depends on the data (halting, ACT, fixed-point solvers).

    Loops that do not come are absent from the recording, and edits there are listed in ``recording.absent``.
    """

    most: int


@dataclass(frozen=True)
class InLoopsOf:
    """For a module that stands beside a looped one and runs in some of its loops: a branch of even loops only.

    Its loop is that of the last call of ``module`` (a path, or the end of one) that has begun in the forward.
    """

    module: str


Count = int | UpTo
"""A number of loops, or the most that can come."""

Cycles = Count | Mapping[str, Count] | InLoopsOf
"""A number of loops; {letter: number} for nested cycles, outermost first; or the loops of another module."""


@dataclass(frozen=True)
class Numbering:
    """How the calls of one module in one forward are numbered.

    ``axes`` are its loops. ``by`` is the module whose calls give the leading ones; the module itself is counted
    anew in each of those calls, for the axes that remain. Without ``by`` all of its calls are counted. ``open_ended``
    says of each axis whether its number is an upper bound; ``beside`` that the module runs after ``by``, not in it.
    ``weight`` is the number of names in the schedule's key that decided, for a module that has several paths.
    """

    axes: LoopAxes = ()
    by: str | None = None
    open_ended: tuple[bool, ...] = ()
    beside: bool = False
    weight: int = field(default=0, compare=False)


@runtime_checkable
class Scheduled(Protocol):
    """What `hooks.foreign.watching` asks of a schedule."""

    def axes(self, path: str) -> LoopAxes | None:
        """How the module at ``path`` is looped: () if it runs once, None if it never runs."""
        ...

    def numbering(self, path: str, called: Collection[str]) -> Numbering | None:
        """How its calls are numbered, in a model that can call the modules at the paths ``called``."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, init=False)
class Schedule:
    """Declared loops. A key is a dotted run of names, ``*`` allowed, found anywhere in a module's path.

    ``core_block`` covers ``transformer.core_block.0.attn`` too; the key of most names decides, so that
    ``{"layers": 4, "layers.3": 8}`` says what it seems to. Raises ValueError for a count below 1, for nested
    cycles without a letter each, and, when a path is looked up, for two keys that disagree.
    """

    entries: tuple[tuple[tuple[str, ...], LoopAxes | InLoopsOf, tuple[bool, ...]], ...]

    def __init__(self, cycles: Mapping[str, Cycles]):
        object.__setattr__(self, "entries", tuple((tuple(key.split(".")), *_axes(key, value))
                                                  for key, value in cycles.items()))

    def axes(self, path: str) -> LoopAxes:
        _, axes, _, _ = self._entry(path)
        return self.axes(axes.module) if isinstance(axes, InLoopsOf) else axes

    def numbering(self, path: str, called: Collection[str]) -> Numbering:
        """Raises ValueError for cycles whose number is open and that nothing counts, and for unknown `InLoopsOf`."""
        region, axes, open_ended, weight = self._entry(path)
        if isinstance(axes, InLoopsOf):
            other = _named(axes.module, path, called)
            looped = self.numbering(other, called)
            return Numbering(looped.axes, other, looped.open_ended, beside=True, weight=weight)
        if not axes:
            return Numbering()
        by: str | None = next((outer for outer in _prefixes(path)[region:] if outer in called), path)
        if by == path:
            by = self._around(path, axes, open_ended, called)
        known = 0 if by is None else len(self.numbering(by, called).axes)
        if any(open_ended[known + 1:]):
            raise ValueError(f"the schedule leaves open how often an inner cycle of {path!r} runs, and no module that "
                             "it covers is called once in each cycle around it: declare the module that is, or give "
                             "the inner cycle a number.")
        return Numbering(axes, by, open_ended, weight=weight)

    def _around(self, path: str, axes: LoopAxes, open_ended: tuple[bool, ...], called: Collection[str]) -> str | None:
        """The module around this one whose own loops are the outer ones of these; None if it is looped by itself."""
        outer = next((outer for outer in reversed(_prefixes(path)[1:-1])
                      if outer in called and self.numbering(outer, called).axes), None)
        if outer is None:
            return None
        around = [n for _, n in self.numbering(outer, called).axes]
        if [n for _, n in axes[:len(around)]] == around:
            return outer
        if any(open_ended):
            raise ValueError(f"{path!r} is inside {outer!r}, which loops {' × '.join(map(str, around))} times, and is "
                             f"numbered by its loops: declare UpTo({around[-1]}) if it runs in some of them, or cycles "
                             "that begin with theirs if it runs several times in each.")
        return None

    def _entry(self, path: str) -> tuple[int, LoopAxes | InLoopsOf, tuple[bool, ...], int]:
        """(number of names up to the end of where the deciding key was found, its axes, which are open, its length)."""
        names = path.split(".")
        best: tuple[int, int, LoopAxes | InLoopsOf, tuple[bool, ...]] = 0, 0, (), ()
        for key, axes, open_ended in self.entries:
            end = _covered(key, names)
            if end and len(key) >= max(best[0], 1):
                if len(key) == best[0] and (axes, open_ended) != best[2:]:
                    raise ValueError(f"two entries of the schedule cover {path!r} and disagree: write a longer one, "
                                     "with more of the path, for it.")
                best = len(key), min(end, best[1] if len(key) == best[0] else end), axes, open_ended
        return *best[1:], best[0]


@dataclass(frozen=True)
class Discovered:
    """Calls per forward as one dry run counted them, by exact path, and how they lay inside one another."""

    calls: tuple[tuple[str, int], ...]
    numberings: tuple[tuple[str, Numbering], ...] = field(default=(), repr=False)

    def axes(self, path: str) -> LoopAxes | None:
        numbering = self._by_path.get(path)
        return None if numbering is None else numbering.axes

    def numbering(self, path: str, called: Collection[str]) -> Numbering | None:
        return self._by_path.get(path)

    @cached_property
    def _by_path(self) -> dict[str, Numbering]:
        return dict(self.numberings)


@dataclass(frozen=True)
class Counted:
    """Declared loops, and for modules that no entry covers what a dry run counted, where there was one."""

    declared: Schedule
    counted: Discovered | None = None

    def axes(self, path: str) -> LoopAxes:
        """A module that the dry run did not call may still run when it is hooked (attention patterns): once."""
        return self.declared.axes(path) or (self.counted and self.counted.axes(path)) or ()

    def numbering(self, path: str, called: Collection[str]) -> Numbering:
        declared = self.declared.numbering(path, called)
        counted = None if self.counted is None else self.counted.numbering(path, called)
        return declared if declared.axes or counted is None else counted


# ----------------------------------------------------------------- architectures


def ouro(total_ut_steps: Count) -> Schedule:
    """Ouro (ByteDance): the whole stack, its norm and its exit gate run ``total_ut_steps`` times."""
    return Schedule(dict.fromkeys(("layers", "norm", "early_exit_gate", "blocks", "ln_final"), total_ut_steps))


def huginn(num_steps: Count) -> Schedule:
    """Huginn / Raven (2502.05171): prelude once, adapter and core ``num_steps`` times, coda once.

    The final norm runs after the recurrence and again after the coda: ``@0`` and ``@1``. The recurrence starts
    from a random state: give ``seed=`` to `hooks.watch`, so that it is the same one each time.
    """
    return Schedule({"adapter": num_steps, "core_block": num_steps, "ln_f": 2, "ln_final": 2})


def hrm_text(h_cycles: Count, l_cycles: int) -> Schedule:
    """HRM-Text: in each of ``h_cycles`` slow cycles, the L stack runs ``l_cycles`` times, then the H stack once."""
    fast: dict[str, Count] = {"h": h_cycles, "l": l_cycles}
    slow: dict[str, Count] = {"h": h_cycles}
    return Schedule({"L_module": fast, "L_blocks": fast, "L_ln_final": fast,
                     "H_module": slow, "H_blocks": slow, "H_ln_final": slow})


def albert(num_hidden_layers: int, num_hidden_groups: int = 1) -> Schedule:
    """ALBERT (1909.11942): each group of layers runs for its share of ``num_hidden_layers``."""
    groups = [int(i / (num_hidden_layers / num_hidden_groups)) for i in range(num_hidden_layers)]
    return Schedule({f"albert_layer_groups.{g}": groups.count(g) for g in sorted(set(groups))})


def schedule_of(module: nn.Module) -> Scheduled | None:
    """The schedule of a model that `hooks.foreign.loopify` loops, or of a known architecture (also under a bridge).

    Read from its config, so for Huginn it holds ``mean_recurrence`` steps: pass ``huginn(num_steps)`` for others.
    """
    if module in LOOPIFIED:
        return LOOPIFIED[module].schedule
    config = getattr(getattr(module, "original_model", module), "config", None)
    known = _KNOWN.get(getattr(config, "model_type", ""))
    return known(config) if known else None


@runtime_checkable
class Loopified(Protocol):
    """A model that `hooks.foreign.loopify` loops: where the block is in its stack, and how often it runs."""

    path: str
    first: int
    n_layers: int
    block: list[nn.Module]

    @property
    def n_loops(self) -> int:
        """How often the block runs."""

    @property
    def schedule(self) -> Schedule:
        """How often each layer of the block runs."""


LOOPIFIED: WeakKeyDictionary[nn.Module, Loopified] = WeakKeyDictionary()
"""Models that `hooks.foreign.loopify` loops at the moment."""

_KNOWN = {
    "ouro": lambda c: ouro(getattr(c, "total_ut_steps", 4)),
    "huginn_raven": lambda c: huginn(c.mean_recurrence),
    "hrm_text": lambda c: hrm_text(c.H_cycles, c.L_cycles),
    "albert": lambda c: albert(c.num_hidden_layers, c.num_hidden_groups),
}


# ------------------------------------------------------------------------ private


def _axes(key: str, cycles: Any) -> tuple[LoopAxes | InLoopsOf, tuple[bool, ...]]:
    """The loops of an entry, and which of their numbers are upper bounds."""
    if isinstance(cycles, InLoopsOf):
        return cycles, ()
    given = (("", cycles),) if isinstance(cycles, (int, UpTo)) else tuple(cycles.items())
    axes = tuple((letter, count.most if isinstance(count, UpTo) else count) for letter, count in given)
    for letter, count in axes:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"the schedule of {key!r} needs whole numbers of at least 1, not {count!r}.")
        if len(axes) > 1 and not letter.isalpha():
            raise ValueError("nested cycles are told apart by letters: "
                             f"{key!r} needs something like {{'h': 2, 'l': 3}}, not {cycles!r}.")
    if not axes:
        raise ValueError(f"the schedule of {key!r} is empty: leave out modules that run once.")
    return axes, tuple(isinstance(count, UpTo) for _, count in given)


def _covered(key: tuple[str, ...], names: list[str]) -> int:
    """How many of ``names`` there are up to the end of the first run that ``key`` fits; 0 if it fits none."""
    return next((i + len(key) for i in range(len(names) - len(key) + 1)
                 if all(map(fnmatch.fnmatchcase, names[i:], key))), 0)


def _prefixes(path: str) -> list[str]:
    """``"a.b"`` → ``["", "a", "a.b"]``."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names) + 1)]


def _named(module: str, path: str, called: Collection[str]) -> str:
    """The one path in ``called`` that is ``module`` or ends in it."""
    found = [module] if module in called else [other for other in called if other.endswith(f".{module}")]
    if len(found) != 1 or found == [path]:
        raise ValueError(f"the schedule gives {path!r} the loops of {module!r}, which is the end of "
                         f"{len(found)} paths of modules that are called{': ' * bool(found)}{', '.join(found[:3])}. "
                         "Write the path of the one looped module that it runs beside.")
    return found[0]
