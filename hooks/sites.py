"""Names of places inside a looped model: ``blocks.2.hook_resid_post@3``.

First stop of the way hooks → probes → studies → app. A **site** is a hook-point
name in TransformerLens' vocabulary, plus ``@loop`` where the layer is looped.
A `SiteSpace` knows which sites can fire in one particular run, and turns what a
user wrote (a name, a glob, a predicate) into sites, or says what is wrong.

    space = SiteSpace({"hook_embed": (), "blocks.1.hook_resid_post": (("", 8),)})
    space.resolve("blocks.*.hook_resid_post@-1")      # [Site 'blocks.1.hook_resid_post@7']
    space.resolve("**.hook_resid_post")               # * stays inside one dotted part, ** crosses parts
    space.resolve("blocks.1.hook_resid_post@8")       # SiteError: loops are 0..7
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LoopAxes = tuple[tuple[str, int], ...]
"""How a name is looped: (letter, count) per nesting level, outermost first; () if it is not."""

SitePattern = str | re.Pattern[str] | Callable[[str], bool] | Iterable[str | re.Pattern[str]] | None
"""What a user may write: a name or glob, a compiled regular expression that is searched for in names, several of
these, a predicate on names (names are without loops in both), or None for all."""


class SiteError(ValueError, KeyError):
    """A site that cannot fire in this run, or that is not in this recording.

    A KeyError too, so that a recording answers ``in`` and ``get`` as a mapping should.
    """

    __str__ = ValueError.__str__  # KeyError's would print the message in quotes


@dataclass(frozen=True)
class Site:
    """One place: a hook-point name, and which firing of it.

    ``loop`` is () for a layer that runs once, (k,) inside one loop, and (h, l) in
    nested cycles, whose letters are in ``axes``: ``L.1.hook_out@h2.l0``.
    """

    name: str
    loop: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.loop:
            return self.name
        return f"{self.name}@{'.'.join(f'{a}{i}' for a, i in zip(self.axes, self.loop, strict=True))}"


def split(pattern: str) -> tuple[str, str | None]:
    """``"name@3"`` → ``("name", "3")``; ``"name"`` → ``("name", None)``."""
    name, at, loop = pattern.partition("@")
    if at and not loop:
        raise SiteError(f"{pattern!r} ends in '@': write a loop number after it, or '@*' for every loop.")
    return name, loop if at else None


@lru_cache(maxsize=1024)
def glob(pattern: str) -> Callable[[str], object]:
    """A test of names: ``*`` and ``?`` stay inside one dotted part, ``**`` stands for any number of parts.

    ``**.hook_out`` covers ``hook_out`` and ``core.0.hook_out``; ``core.**`` all that is below ``core``.
    """
    *firsts, last = pattern.split(".")
    regex = "".join(r"(?:[^.]+\.)*" if part == "**" else _part(part) + r"\." for part in firsts)
    return re.compile(regex + (".+" if last == "**" else _part(last)), re.DOTALL).fullmatch


class SiteSpace:
    """All the sites that fire in one run, in the order in which the names were given.

    ``absent`` are firings that do not happen in this run. ``aliases`` are further names of names, which globs find
    too. Of the names in ``open_ended`` it is not known before the run how many of their loops will come: the loops
    given are an upper bound, and ``@-1`` is refused. With ``guessed``, a name that runs once may as well be a loop
    that runs once here, and ``@0`` is accepted.
    """

    def __init__(self, names: Mapping[str, LoopAxes], absent: Set[Site] = frozenset(), *,
                 aliases: Mapping[str, str] | None = None, open_ended: Set[str] = frozenset(), guessed: bool = False):
        self.names: dict[str, LoopAxes] = dict(names)
        self.absent, self.open_ended = frozenset(absent), frozenset(open_ended)
        self.aliases, self.guessed = dict(aliases or {}), guessed
        self._resolved: dict[str, list[Site]] = {}  # globbing is slow beside a small model's forward
        self._ranks: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"SiteSpace({len(self.names)} names, {len(self.all())} sites)"

    def axes(self, name: str) -> LoopAxes:
        """How a name is looped."""
        return self.names[name]

    def is_open_ended(self, name: str) -> bool:
        """Is the number of its loops an upper bound?"""
        return name in self.open_ended

    def matching(self, pattern: str) -> list[str]:
        """The names that a pattern without a loop stands for: itself, what it is an alias of, or what a glob finds."""
        if pattern in self.names:
            return [pattern]
        if pattern in self.aliases:
            return [self.aliases[pattern]]
        accepts = glob(pattern)
        found = [name for name in self.names if accepts(name)]
        if self.aliases:
            also = {name for alias, name in self.aliases.items() if accepts(alias)}.difference(found)
            found = sorted({*found, *also}, key=self._rank) if also else found
        return found

    def firings(self, name: str) -> list[Site]:
        """Every site of one name, loop by loop."""
        axes = self.axes(name)
        letters = tuple(letter for letter, _ in axes)
        sites = [Site(name, loop, letters) for loop in itertools.product(*(range(n) for _, n in axes))]
        return [site for site in sites if site not in self.absent] if self.absent else sites

    def all(self) -> list[Site]:
        return [site for name in self.names for site in self.firings(name)]

    def resolve(self, patterns: SitePattern) -> list[Site]:
        """The sites that ``patterns`` name, each once, in the space's order.

        A looped name without ``@`` means every loop. Raises `SiteError` for a pattern
        that matches nothing in this run, with the nearest sites that exist.
        """
        if patterns is None:
            return self.all()
        if callable(patterns):
            return self._accepted(patterns, "names_filter accepted")
        wanted = [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)
        if not wanted:
            raise SiteError("An empty list of sites was given: name at least one, or pass None for all.")
        if len(wanted) == 1:
            return list(self._resolve_one(wanted[0]))
        found = {site for pattern in wanted for site in self._resolve_one(pattern)}
        named = sorted({site.name for site in found}, key=self._rank)
        return [site for name in named for site in self.firings(name) if site in found]

    def one(self, pattern: str) -> Site:
        """The single site that ``pattern`` names; `SiteError` if it names several."""
        sites = self._resolve_one(pattern)
        if len(sites) > 1:
            raise SiteError(f"{pattern!r} names {len(sites)} sites, from {sites[0]} to {sites[-1]}; "
                            f"say which one ('@0', '@-1'), or use stack() for all of them.")
        return sites[0]

    # ------------------------------------------------------------------ private

    def _accepted(self, predicate: Callable[[str], object], what: str) -> list[Site]:
        chosen = [site for name in self.names if predicate(name) for site in self.firings(name)]
        if not chosen:
            raise SiteError(f"{what} none of the sites of this run; they are, for example, {self._some(self.names)}.")
        return chosen

    def _rank(self, name: str) -> Any:
        if not self._ranks:
            self._ranks = {known: i for i, known in enumerate(self.names)}
        return self._ranks[name]

    def _resolve_one(self, pattern: str | re.Pattern[str]) -> list[Site]:
        if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
            hint = " (names have no loops: choose those with a glob, 'name@3')" if "@" in pattern.pattern else ""
            return self._accepted(pattern.search, f"re.compile({pattern.pattern!r}){hint} is found in")
        if not isinstance(pattern, str):
            raise SiteError(f"A site is a string such as 'blocks.0.hook_resid_post', not {pattern!r}.")
        if pattern not in self._resolved:
            self._resolved[pattern] = self._looked_up(pattern)
        return self._resolved[pattern]

    def _looked_up(self, pattern: str) -> list[Site]:
        name, at = split(pattern)
        names = self.matching(name)
        if not names:
            raise SiteError(f"No site is called {name!r}. {self._crossing(name)}Nearest: {self._nearest(name)}.")
        if at is None:
            return self._present([site for n in names for site in self.firings(n)], pattern)
        looped = [n for n in names if self.axes(n)]
        if not looped:
            if not self.guessed or at not in ("0", "-1", "*"):
                raise SiteError(f"{name!r} runs once per forward and takes no '@{at}': write {names[0]!r}. "
                                f"Only looped layers have loops.")
            return self._present([site for n in names for site in self.firings(n)], pattern)
        sites = [site for n in looped if len(axes := self.axes(n)) == at.count(".") + 1 or at == "*"
                 for site in self._at(n, at, axes, pattern)]
        if not sites:
            axes = self.axes(looped[0])
            example = ".".join(f"{letter}0" for letter, _ in axes)
            raise SiteError(f"{pattern!r}: {looped[0]} is looped over {len(axes)} cycles; write '@{example}'.")
        return self._present(sites, pattern)

    def _present(self, sites: list[Site], pattern: str) -> list[Site]:
        present = [site for site in sites if site not in self.absent] if self.absent else sites
        if not present:
            raise SiteError(f"{pattern!r} cannot fire: this run does not come to it, because an edit skips it or the "
                            f"model leaves it out. {self._running(sites[0].name)}")
        return present

    def _running(self, name: str) -> str:
        there = self.firings(name)
        return (f"{name} runs in {self._some(str(site) for site in there)}." if there else "Name a site that still "
                "runs, or drop that edit.")

    def _at(self, name: str, at: str, axes: LoopAxes, pattern: str) -> list[Site]:
        if at == "*":
            return self.firings(name)
        parts = at.split(".")
        chosen = []
        for part, (letter, count) in zip(parts, axes, strict=True):
            if letter and not part.startswith(letter):
                raise SiteError(f"{pattern!r}: the loops of {name} are written "
                                f"'@{'.'.join(f'{a}0' for a, _ in axes)}'.")
            chosen.append(_indices(part[len(letter):], count, pattern, name, self.is_open_ended(name)))
        letters = tuple(letter for letter, _ in axes)
        return [Site(name, loop, letters) for loop in itertools.product(*chosen)]

    def _crossing(self, name: str) -> str:
        wider = re.sub(r"\*+", "**", name)
        return (f"A '*' stays inside one dotted part: {wider!r} crosses parts. "
                if wider != name and self.matching(wider) else "")

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.4)
        return self._some(near or self.names)

    @staticmethod
    def _some(names: Iterable[str]) -> str:
        listed = list(names)
        return ", ".join(repr(n) for n in listed[:3]) + (" …" if len(listed) > 3 else "")


def _indices(text: str, count: int, pattern: str, name: str, open_ended: bool) -> list[int]:
    """``"*"``, ``"3"``, ``"-1"`` or ``"1:4"`` as loop numbers below ``count``."""
    if text == "*":
        return list(range(count))
    try:
        if ":" in text:
            start, stop = text.split(":")
            picked = list(range(count))[slice(int(start) if start else None, int(stop) if stop else None)]
        else:
            index = int(text)
            picked = [index + count if index < 0 else index]
    except ValueError:
        raise SiteError(f"{pattern!r}: {text!r} is not a loop; write a number, '-1', '1:4' or '*'.") from None
    if open_ended and "-" in text:
        raise SiteError(f"{pattern!r}: {name} runs up to {count} loops, and which is the last is known only when the "
                        "forward ends: write the number of a loop, or '*' for every loop that comes.")
    if not picked or not all(0 <= i < count for i in picked):
        raise SiteError(f"{pattern!r} cannot fire: {name} runs {'up to ' * open_ended}{count} loop{'s' * (count != 1)} "
                        f"here, numbered 0..{count - 1}. Nearest: '{name}@{count - 1}'. "
                        f"Pass a larger n_loops to run more.")
    return picked


def _part(part: str) -> str:
    """One dotted part of a glob as a regular expression; two stars beside other signs cross dots."""
    def sign(found: re.Match[str]) -> str:
        text = found.group()
        if text[0] == "[" and len(text) > 2:
            negated = text[1] == "!"
            chars = text[1 + negated:-1].replace("\\", r"\\").replace("^", r"\^")
            return rf"(?!\.)[{'^' * negated}{chars}]"
        return {"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(text) or re.escape(text)

    return re.sub(r"\*\*|\[!?[^\]]+\]|.", sign, part, flags=re.DOTALL)
