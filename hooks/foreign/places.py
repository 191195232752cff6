"""The sites of any module: its places by name, the space that a schedule makes of them, and choices among them.

A name after ``hook_in`` or ``hook_out`` is one element of what the module takes or returns: ``attn.hook_out.1``.
Stands between `hooks.foreign.discovery` (which modules there are) and `hooks.foreign.watching` (which hooks them).
Finding and globbing names is slow beside a small model's forward, so that it is done once per model layout and kept.

    places = places_of(model, Schedule({"core": 8}))
    places.choose("core.*.hook_out@-1").firings     # {'core.0.hook_out': (7,), …}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from hooks.foreign.discovery import is_bridge, modules_of
from hooks.foreign.schedules import Discovered, Numbering, Scheduled
from hooks.sites import LoopAxes, Site, SiteError, SitePattern, SiteSpace, split


@dataclass(frozen=True)
class Firing:
    """One firing of one site, as hook functions get to see it; ``loop`` is a tuple in nested cycles.

    ``axes`` are the names of the activation's axes, where they are not those that the site's name implies.
    """

    name: str
    site: str
    loop: int | tuple[int, ...] | None
    axes: tuple[str, ...] | None = None


class Place(NamedTuple):
    module: nn.Module
    path: str
    kind: str  # "in" or "out" of the module
    element: str | None = None  # of a tuple or dict that it takes or returns; None is the hidden state in it


class Choice(NamedTuple):
    """What a pattern stands for: by name, the firings (None for all); which names it spells out; each part's firings.

    ``from_end`` has (name, loops) where loops are counted from a last one that is not known before the run, and
    ``outright`` the firings that are asked for whatever the last loop is.
    """

    firings: dict[str, tuple[int, ...] | None]
    exact: frozenset[str]
    asked: list[tuple[str, dict[str, tuple[int, ...] | None]]]
    from_end: tuple[tuple[str, str], ...] = ()
    outright: frozenset[tuple[str, int]] = frozenset()


class ElementSpace(SiteSpace):
    """A space in which each name has elements too, ``attn.hook_out.1``, found where they are spelled out."""

    def axes(self, name: str) -> LoopAxes:
        return self.names[name if name in self.names else element_of(name)[0]]

    def matching(self, pattern: str) -> list[str]:
        base, element = element_of(pattern)
        if element is None:
            return super().matching(pattern)
        if re.search(r"[*?\[]", element):
            raise SiteError(f"{pattern!r}: which elements there are is known only when the module runs: spell them "
                            f"out, such as {base + '.1'!r}. describe(module, inputs) lists them.")
        return [f"{name}.{element}" for name in super().matching(base)]

    def is_open_ended(self, name: str) -> bool:
        return element_of(name)[0] in self.open_ended

    def _rank(self, name: str) -> Any:
        return super()._rank(element_of(name)[0]), name


def element_of(name: str) -> tuple[str, str | None]:
    """``"attn.hook_out.1"`` → ``("attn.hook_out", "1")``; ``"attn.hook_out"`` → ``("attn.hook_out", None)``."""
    found = _ELEMENT.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


class Layout:
    """Names, their loops, and remembered choices among them: all that does not depend on the module itself."""

    def __init__(self, space: SiteSpace, main: tuple[str, ...], numberings: dict[str, Numbering]):
        self.space, self.main, self.numberings = space, main, numberings
        self._firings: dict[str, tuple[Firing, ...]] = {}
        self._index: dict[str, dict[Site, int]] = {}
        self._chosen: dict[tuple[str, bool], Choice] = {}

    def firings(self, name: str) -> tuple[Firing, ...]:
        if name not in self._firings:
            sites = self.space.firings(name)
            self._firings[name] = tuple(Firing(name, str(s), None if not s.loop else s.loop[0] if len(s.loop) == 1
                                               else s.loop) for s in sites)
            self._index[name] = {site: i for i, site in enumerate(sites)}
        return self._firings[name]

    def index(self, name: str) -> dict[Site, int]:
        """The number of each firing of a name."""
        self.firings(name)
        return self._index[name]

    def choose(self, pattern: SitePattern, *, from_end: bool = False) -> Choice:
        """Raises SiteError for what cannot fire, as `SiteSpace.resolve` does.

        With ``from_end``, loops such as ``@-1`` may be asked for where the last one is not known before the run.
        """
        if isinstance(pattern, str):
            if (pattern, from_end) not in self._chosen:
                self._chosen[pattern, from_end] = self._choice(pattern, repr(pattern), from_end)
            return self._chosen[pattern, from_end]
        if pattern is None:
            return self._choice(frozenset(self.main).__contains__, "the whole module")
        if callable(pattern):
            return self._choice(pattern, "the names that the predicate accepts")
        if isinstance(pattern, re.Pattern):
            return self._choice(pattern, repr(pattern))
        return self._merged([self.choose(part, from_end=from_end) for part in _listed(pattern, self.space)])

    def _choice(self, pattern: str | re.Pattern[str] | Callable[[str], bool], shown: str,
                from_end: bool = False) -> Choice:
        name, at = split(pattern) if isinstance(pattern, str) else ("*", None)
        counted_back = [found for found in self.space.matching(name) if self.space.is_open_ended(found)] if (
            from_end and at and "-" in at) else []
        chosen: dict[str, list[int]] = {}
        for site in self.space.resolve(pattern if not counted_back else [
                found if found in counted_back else f"{found}@{at}" for found in self.space.matching(name)
                if self.space.axes(found)]):
            chosen.setdefault(site.name, []).append(self.index(site.name)[site])
        firings = {name: None if len(chosen_of) == len(self._firings[name]) else tuple(chosen_of)
                   for name, chosen_of in chosen.items()}
        exact = frozenset() if re.search(r"[*?\[]", name) else frozenset(firings)
        outright = frozenset((name, i) for name, indices in chosen.items() if name not in counted_back for i in indices
                             if self.space.is_open_ended(name))
        return Choice(firings, exact, [(shown, firings)], tuple((found, at or "") for found in counted_back), outright)

    def _merged(self, choices: list[Choice]) -> Choice:
        firings: dict[str, tuple[int, ...] | None] = {}
        for choice in choices:
            for name, indices in choice.firings.items():
                known = firings.get(name, ())
                firings[name] = None if known is None or indices is None else tuple(sorted({*known, *indices}))
        return Choice(firings, frozenset().union(*(choice.exact for choice in choices)),
                      [asked for choice in choices for asked in choice.asked],
                      tuple(entry for choice in choices for entry in choice.from_end),
                      frozenset().union(*(choice.outright for choice in choices)))


@dataclass(frozen=True)
class Places:
    """The places of one module, with the layout of their sites."""

    modules: dict[str, nn.Module]
    layout: Layout
    bridge: bool

    @property
    def space(self) -> SiteSpace:
        return self.layout.space

    def place(self, name: str) -> Place:
        if self.bridge:
            return Place(self.modules[name], name, "out")
        base, element = element_of(name)
        path, _, kind = base.rpartition("hook_")
        path = path.removesuffix(".")
        return Place(self.modules[path], path, kind, element)

    def numbering(self, path: str) -> Numbering:
        return self.layout.numberings[path]

    def firings(self, name: str) -> tuple[Firing, ...]:
        return self.layout.firings(name)

    def choose(self, pattern: SitePattern, *, from_end: bool = False) -> Choice:
        return self.layout.choose(pattern, from_end=from_end)


def places_of(module: nn.Module, schedule: Scheduled) -> Places:
    """Every place of ``module`` that runs by ``schedule``.

    Of a bridge these are its hook points under all their names, of which None (everything) means the canonical ones.
    """
    (found, aliases), bridge = modules_of(module), is_bridge(module)
    main = tuple(name for name, part in found.items()
                 if getattr(part, "name", name) in (name, None)) if bridge else ()
    return Places(found, _layout(tuple(found), tuple(aliases.items()), main, bridge, schedule), bridge)


@lru_cache(maxsize=64)
def _layout(paths: tuple[str, ...], aliases: tuple[tuple[str, str], ...], main: tuple[str, ...], bridge: bool,
            schedule: Any) -> Layout:
    def named(path: str) -> list[str]:
        return [path] if bridge else [f"{path}.hook_{kind}" if path else f"hook_{kind}" for kind in ("in", "out")]

    numberings = {path: numbering for path, numbering in _numbered(paths, aliases, schedule).items()
                  if numbering is not None}
    space = (SiteSpace if bridge else ElementSpace)(
        {name: numbering.axes for path, numbering in numberings.items() for name in named(path)},
        aliases=dict(pair for other, path in aliases if path in numberings
                     for pair in zip(named(other), named(path), strict=True)),
        open_ended={name for path, numbering in numberings.items() if any(numbering.open_ended)
                    for name in named(path)}, guessed=isinstance(schedule, Discovered))
    return Layout(space, main or tuple(space.names), numberings)


def _numbered(paths: tuple[str, ...], aliases: tuple[tuple[str, str], ...],
              schedule: Scheduled) -> dict[str, Numbering | None]:
    """How each module is numbered; of a module with several paths the schedule's longest key decides, as ever."""
    first, called = dict(aliases), frozenset(paths)
    found = {path: schedule.numbering(path, called) for path in paths}
    called |= first.keys()
    for other, path in aliases:
        known, also = found[path], schedule.numbering(other, called)
        if known is None or also is None or not also.weight or also.weight < known.weight:
            continue
        if also.weight == known.weight and known.axes != also.axes:
            raise ValueError(f"the schedule loops {path!r} and {other!r} differently, and they are one module: give "
                             "both the same loops.")
        if also.weight > known.weight:
            found[path] = replace(also, by=first.get(also.by or "", also.by))
    return found


def _listed(pattern: Iterable[str | re.Pattern[str]], space: SiteSpace) -> list[str | re.Pattern[str]]:
    listed = list(pattern)
    if not listed or not all(isinstance(part, (str, re.Pattern)) for part in listed):
        space.resolve(listed)  # says what is wrong
        raise SiteError("sites are strings.")
    return listed


_ELEMENT = re.compile(r"((?:.*\.)?hook_(?:in|out))\.(.+)")
