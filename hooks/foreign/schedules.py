"""Which modules loop, and how often: declared for a module of one's own, known for Ouro, Huginn, HRM-Text, ALBERT.

`hooks.foreign.watching` turns a schedule into sites. A module that no entry covers runs once per forward;
an entry with one number is a loop (``@3``), one with letters is nested cycles (``@h1.l0``).

    Schedule({"core_block": 8})                          # core_block and everything below it, wherever it stands
    Schedule({"L_module": {"h": 2, "l": 3}, "H_module": {"h": 2}})
    schedule_of(model)                                   # known from model.config, or None
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import nn

from hooks.sites import LoopAxes

if TYPE_CHECKING:
    from hooks.foreign.loopify import Loops

Cycles = int | Mapping[str, int]
"""A number of loops, or {letter: number} for nested cycles, outermost first."""


@runtime_checkable
class Scheduled(Protocol):
    """What `hooks.foreign.watching` asks of a schedule."""

    def axes(self, path: str) -> LoopAxes | None:
        """How the module at ``path`` is looped: () if it runs once, None if it never runs."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, init=False)
class Schedule:
    """Declared loops. A key is a dotted run of names, ``*`` allowed, found anywhere in a module's path.

    ``core_block`` covers ``transformer.core_block.0.attn`` too; the key of most names decides, so that
    ``{"layers": 4, "layers.3": 8}`` says what it seems to. Raises ValueError for a count below 1, for nested
    cycles without a letter each, and, when a path is looked up, for two keys that disagree.
    """

    entries: tuple[tuple[tuple[str, ...], LoopAxes], ...]

    def __init__(self, cycles: Mapping[str, Cycles]):
        object.__setattr__(self, "entries", tuple((tuple(key.split(".")), _axes(key, value))
                                                  for key, value in cycles.items()))

    def axes(self, path: str) -> LoopAxes:
        names = path.split(".")
        best: tuple[int, LoopAxes] = (0, ())
        for key, axes in self.entries:
            if len(key) >= max(best[0], 1) and _covers(key, names):
                if len(key) == best[0] and axes != best[1]:
                    raise ValueError(f"two entries of the schedule cover {path!r} and disagree: write a longer one, "
                                     "with more of the path, for it.")
                best = len(key), axes
        return best[1]


@dataclass(frozen=True)
class Discovered:
    """Calls per forward as one dry run counted them, by exact path; numbered flat, whatever the nesting."""

    calls: tuple[tuple[str, int], ...]

    def axes(self, path: str) -> LoopAxes | None:
        calls = dict(self.calls).get(path, 0)
        return None if calls == 0 else () if calls == 1 else (("", calls),)


@dataclass(frozen=True)
class Counted:
    """Declared loops, and for modules that no entry covers what a dry run counted, where there was one."""

    declared: Schedule
    counted: Discovered | None = None

    def axes(self, path: str) -> LoopAxes | None:
        return self.declared.axes(path) or (() if self.counted is None else self.counted.axes(path))


# ----------------------------------------------------------------- architectures


def ouro(total_ut_steps: int) -> Schedule:
    """Ouro (ByteDance): the whole stack, its norm and its exit gate run ``total_ut_steps`` times."""
    return Schedule(dict.fromkeys(("layers", "norm", "early_exit_gate", "blocks", "ln_final"), total_ut_steps))


def huginn(num_steps: int) -> Schedule:
    """Huginn / Raven (2502.05171): prelude once, adapter and core ``num_steps`` times, coda once.

    The final norm runs after the recurrence and again after the coda: ``@0`` and ``@1``. The recurrence starts
    from a random state: give ``seed=`` to `hooks.watch`, so that it is the same one each time.
    """
    return Schedule({"adapter": num_steps, "core_block": num_steps, "ln_f": 2, "ln_final": 2})


def hrm_text(h_cycles: int, l_cycles: int) -> Schedule:
    """HRM-Text: in each of ``h_cycles`` slow cycles, the L stack runs ``l_cycles`` times, then the H stack once."""
    fast, slow = {"h": h_cycles, "l": l_cycles}, {"h": h_cycles}
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
        return LOOPIFIED[module]
    config = getattr(getattr(module, "original_model", module), "config", None)
    known = _KNOWN.get(getattr(config, "model_type", ""))
    return known(config) if known else None


LOOPIFIED: WeakKeyDictionary[nn.Module, Loops] = WeakKeyDictionary()
"""Models that `hooks.foreign.loopify` loops at the moment."""

_KNOWN = {
    "ouro": lambda c: ouro(getattr(c, "total_ut_steps", 4)),
    "huginn_raven": lambda c: huginn(c.mean_recurrence),
    "hrm_text": lambda c: hrm_text(c.H_cycles, c.L_cycles),
    "albert": lambda c: albert(c.num_hidden_layers, c.num_hidden_groups),
}


# ------------------------------------------------------------------------ private


def _axes(key: str, cycles: Any) -> LoopAxes:
    axes = (("", cycles),) if isinstance(cycles, int) else tuple(cycles.items())
    for letter, count in axes:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"the schedule of {key!r} needs whole numbers of at least 1, not {count!r}.")
        if len(axes) > 1 and not letter.isalpha():
            raise ValueError("nested cycles are told apart by letters: "
                             f"{key!r} needs something like {{'h': 2, 'l': 3}}, not {cycles!r}.")
    if not axes:
        raise ValueError(f"the schedule of {key!r} is empty: leave out modules that run once.")
    return axes


def _covers(key: tuple[str, ...], names: list[str]) -> bool:
    return any(all(map(fnmatch.fnmatchcase, names[i:], key)) for i in range(len(names) - len(key) + 1))
