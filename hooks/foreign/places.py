"""The sites of any module: its places by name, the space that a schedule makes of them, and choices among them.

Stands between `hooks.foreign.discovery` (which modules there are) and `hooks.foreign.watching` (which hooks them).
Finding and globbing names is slow beside a small model's forward, so that it is done once per model layout and kept.

    places = places_of(model, Schedule({"core": 8}))
    places.choose("core.*.hook_out@-1").firings     # {'core.0.hook_out': (7,), …}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from hooks.foreign.discovery import is_bridge, modules_of
from hooks.foreign.schedules import Scheduled
from hooks.sites import LoopAxes, Site, SiteError, SitePattern, SiteSpace, split


@dataclass(frozen=True)
class Firing:
    """One firing of one site, as hook functions get to see it; ``loop`` is a tuple in nested cycles."""

    name: str
    site: str
    loop: int | tuple[int, ...] | None


class Place(NamedTuple):
    module: nn.Module
    kind: str  # "in" or "out" of the module


class Choice(NamedTuple):
    """What a pattern stands for: by name, the firings (None for all); which names it spells out; each part's names."""

    firings: dict[str, tuple[int, ...] | None]
    exact: frozenset[str]
    asked: list[tuple[str, list[str]]]


class Layout:
    """Names, their loops, and remembered choices among them: all that does not depend on the module itself."""

    def __init__(self, names: dict[str, LoopAxes], main: tuple[str, ...]):
        self.space = SiteSpace(names)
        self.main = main
        self._firings: dict[str, tuple[Firing, ...]] = {}
        self._index: dict[str, dict[Site, int]] = {}
        self._chosen: dict[str, Choice] = {}

    def firings(self, name: str) -> tuple[Firing, ...]:
        if name not in self._firings:
            sites = self.space.firings(name)
            self._firings[name] = tuple(Firing(name, str(s), None if not s.loop else s.loop[0] if len(s.loop) == 1
                                               else s.loop) for s in sites)
            self._index[name] = {site: i for i, site in enumerate(sites)}
        return self._firings[name]

    def choose(self, pattern: SitePattern) -> Choice:
        """Raises SiteError for what cannot fire, as `SiteSpace.resolve` does."""
        if isinstance(pattern, str):
            if pattern not in self._chosen:
                self._chosen[pattern] = self._choice(pattern, repr(pattern))
            return self._chosen[pattern]
        if pattern is None:
            return self._choice(frozenset(self.main).__contains__, "the whole module")
        if callable(pattern):
            return self._choice(pattern, "the names that the predicate accepts")
        if isinstance(pattern, re.Pattern):
            return self._choice(pattern, repr(pattern))
        return self._merged([self.choose(part) for part in _listed(pattern, self.space)])

    def _choice(self, pattern: str | re.Pattern[str] | Callable[[str], bool], shown: str) -> Choice:
        chosen: dict[str, list[int]] = {}
        for site in self.space.resolve(pattern):
            self.firings(site.name)
            chosen.setdefault(site.name, []).append(self._index[site.name][site])
        firings = {name: None if len(chosen_of) == len(self._firings[name]) else tuple(chosen_of)
                   for name, chosen_of in chosen.items()}
        exact = frozenset({split(pattern)[0]} & firings.keys()) if isinstance(pattern, str) else frozenset()
        return Choice(firings, exact, [(shown, list(firings))])

    def _merged(self, choices: list[Choice]) -> Choice:
        firings: dict[str, tuple[int, ...] | None] = {}
        for choice in choices:
            for name, indices in choice.firings.items():
                known = firings.get(name, ())
                firings[name] = None if known is None or indices is None else tuple(sorted({*known, *indices}))
        return Choice({name: firings[name] for name in self.space.names if name in firings},
                      frozenset().union(*(choice.exact for choice in choices)),
                      [asked for choice in choices for asked in choice.asked])


@dataclass(frozen=True)
class Places:
    """The places of one module, with the layout of their sites."""

    places: dict[str, Place]
    layout: Layout
    bridge: bool

    @property
    def space(self) -> SiteSpace:
        return self.layout.space

    def firings(self, name: str) -> tuple[Firing, ...]:
        return self.layout.firings(name)

    def choose(self, pattern: SitePattern) -> Choice:
        return self.layout.choose(pattern)


def places_of(module: nn.Module, schedule: Scheduled) -> Places:
    """Every place of ``module`` that runs by ``schedule``.

    Of a bridge these are its hook points under all their names, of which None (everything) means the canonical ones.
    """
    found, bridge = modules_of(module), is_bridge(module)
    if bridge:
        places = {name: Place(part, "out") for name, part in found.items()}
        main = tuple(name for name, part in found.items() if getattr(part, "name", name) in (name, None))
    else:
        places = {f"{path}.hook_{kind}" if path else f"hook_{kind}": Place(part, kind)
                  for path, part in found.items() for kind in ("in", "out")}
        main = ()
    return Places(places, _layout(tuple(found), main, bridge, schedule), bridge)


@lru_cache(maxsize=64)
def _layout(paths: tuple[str, ...], main: tuple[str, ...], bridge: bool, schedule: Any) -> Layout:
    names: dict[str, LoopAxes] = {}
    for path in paths:
        axes = schedule.axes(path)
        if axes is not None:
            kinds = [path] if bridge else [f"{path}.hook_{k}" if path else f"hook_{k}" for k in ("in", "out")]
            names.update(dict.fromkeys(kinds, axes))
    return Layout(names, main or tuple(names))


def _listed(pattern: Iterable[str | re.Pattern[str]], space: SiteSpace) -> list[str | re.Pattern[str]]:
    listed = list(pattern)
    if not listed or not all(isinstance(part, (str, re.Pattern)) for part in listed):
        space.resolve(listed)  # says what is wrong
        raise SiteError("sites are strings.")
    return listed
