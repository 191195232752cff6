"""Which loop is this? Counting the calls of one module in one forward, against a schedule.

A `Counter` numbers the calls of one module: by themselves, or, where the schedule knows a looped module around it, by
the call of that module which is running. `hooks.foreign.firings` has one per site, and one per looped module around.

    core = Counter("core", Numbering((("", 4),)))
    expert = Counter("core.expert", Numbering((("", 4),), by="core"), by=core)
    core.enter(); expert.step()                       # 0
    core.leave(); core.enter(); core.leave()          # the expert is not called in loop 1
    core.enter(); expert.step()                       # 2
"""

from __future__ import annotations

from math import prod

from hooks.foreign.schedules import Numbering
from hooks.sites import LoopAxes


class Counter:
    """The calls of the module at ``path`` in one forward. ``by`` counts the module whose calls number them."""

    __slots__ = ("alone", "by", "came", "crowded", "depth", "entered", "index", "most", "numbering", "path", "seen",
                 "total", "width", "within")

    def __init__(self, path: str, numbering: Numbering, by: Counter | None = None):
        self.path, self.numbering, self.by = path, numbering, by
        self.total = prod(n for _, n in numbering.axes)
        self.width = self.total // by.total if by else self.total  # its calls in each call of ``by``
        self.restart()

    def restart(self) -> None:
        """A forward begins."""
        self.alone = self.entered = self.depth = self.seen = self.within = self.most = self.index = 0
        self.crowded = False             # called more often in one call of ``by`` than the schedule has loops for
        self.came: set[int] = set()      # the numbers of calls that ``by`` gave

    # ---- during a forward

    def step(self) -> int:
        """The module is called: the number of this call, from 0."""
        by = self.by
        if by is None or not (by.depth or (by.entered and self.numbering.beside)):
            self.index = self.alone
            self.alone += 1
            return self.index
        if by.entered != self.seen:
            self.seen, self.within = by.entered, 0
        else:
            self.within += 1
            self.crowded |= self.within >= self.width
        self.most = max(self.most, self.within + 1)
        self.index = by.index * self.width + min(self.within, self.width - 1)
        self.came.add(self.index)
        return self.index

    def enter(self) -> None:
        """The module is called, and numbers what is called until `leave`."""
        if self.by is None:
            self.index = self.alone
            self.alone += 1
        else:
            self.step()
        self.depth += 1
        self.entered += 1

    def leave(self) -> None:
        """Its call has ended."""
        self.depth -= 1

    # ---- after it

    @property
    def calls(self) -> int:
        return self.alone if not self.numbered_by_another else len(self.came)

    @property
    def numbered_by_another(self) -> bool:
        """Did ``by`` run in this forward? (If not, the module was counted by itself.)"""
        return self.by is not None and self.by.entered > 0

    @property
    def open_ended(self) -> bool:
        return any(self.numbering.open_ended)

    def reached(self, index: int) -> bool:
        """Did the call of this number come?"""
        return index in self.came if self.numbered_by_another else index < self.alone

    def unnumbered(self) -> str | None:
        """Why its calls have no number each, or None if they have."""
        if not self.numbered_by_another:
            return f"ran {times(self.alone)}" if self.total == 1 < self.alone and not self.numbering.axes else None
        assert self.by is not None
        if self.crowded:
            return f"ran {times(self.most)} in one loop of {self.by.path}"
        if self.alone:
            return f"ran outside of {self.by.path} too, by whose loops it is numbered"
        return None

    def miscounted(self) -> str | None:
        """What the number of its calls is, if the schedule does not allow it."""
        if self.numbered_by_another:
            return None
        cycle = prod(n for _, n in self.numbering.axes[1:])
        if self.open_ended and self.alone <= self.total and self.alone % cycle == 0:
            return None
        return None if self.alone == self.total else f"ran {times(self.alone)}"

    def axes(self) -> LoopAxes:
        """Its loops in this forward: as the schedule says, where that is open as many as came."""
        if not self.open_ended:
            return self.numbering.axes
        outer = self.by.axes() if self.numbered_by_another and self.by else ()
        sizes = [n for _, n in outer] + [n for _, n in self.numbering.axes[len(outer):]]
        if len(outer) < len(sizes) and self.numbering.open_ended[len(outer)]:
            calls = self.most if self.numbered_by_another else self.alone
            sizes[len(outer)] = -(-calls // prod(sizes[len(outer) + 1:]))
        return tuple((letter, n) for (letter, _), n in zip(self.numbering.axes, sizes, strict=True))


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
