"""Where a model lets itself be observed: hook points that know which loop is running.

A `HookPoint` is an identity that calls whatever was attached to it, in the manner of
TransformerLens, with one thing more: a `LoopClock`, shared by the whole model, tells it
the current loop, so that a function can be attached to loop 3 alone. It is a plain
object, not an ``nn.Module``: an unhooked call costs some 50 ns, so that a model with
hundreds of them runs as fast as one with none.

    point = HookPoint("blocks.1.hook_resid_post", clock, looped=True)
    point.add(lambda x, hook: x * 0, loops={3})     # hook.site == "blocks.1.hook_resid_post@3"
    x = point(x)
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple, Protocol

from torch import Tensor


class HookFunction(Protocol):
    """TransformerLens' signature: returns a replacement, or None to leave the value alone."""

    def __call__(self, activation: Tensor, /, *, hook: HookPoint) -> Tensor | None: ...


class LoopClock:
    """The loop that is running, shared by every hook point of a model.

    ``runs`` counts forwards, ``ran`` is the number of loops of the last one, and
    ``stopped_early`` says that it stopped adaptively before the loops it was allowed.
    While ``muted``, hook points are plain identities.
    """

    __slots__ = ("loop", "muted", "ran", "runs", "stopped_early")

    def __init__(self) -> None:
        self.loop = self.runs = self.ran = 0
        self.stopped_early = self.muted = False

    def finish(self, ran: int, allowed: int) -> None:
        """Note that a forward has run ``ran`` of ``allowed`` loops."""
        self.runs += 1
        self.ran, self.stopped_early = ran, ran < allowed


class Attached(NamedTuple):
    """A function at a hook point. ``fired`` collects the loops in which it was called."""

    loops: Set[int] | None   # None: every loop
    fn: HookFunction
    fired: set[int]


class HookPoint:
    """An identity that calls the functions attached to it.

    ``name`` is the TransformerLens name; ``loop`` and ``site`` say which firing this is.
    """

    __slots__ = ("clock", "entries", "looped", "name")

    def __init__(self, name: str, clock: LoopClock, looped: bool):
        self.name = name
        self.clock = clock
        self.looped = looped
        self.entries: tuple[Attached, ...] = ()

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, {len(self.entries)} attached)"

    @property
    def loop(self) -> int | None:
        """The current loop, or None where the layer runs once."""
        return self.clock.loop if self.looped else None

    @property
    def site(self) -> str:
        return f"{self.name}@{self.clock.loop}" if self.looped else self.name

    def __call__(self, activation: Tensor) -> Tensor:
        return self._fire(activation) if self.entries else activation

    def wanted(self) -> bool:
        """Is anything attached here for the loop that is running?"""
        loop = self.clock.loop
        return not self.clock.muted and any(loops is None or loop in loops for loops, _, _ in self.entries)

    def add(self, fn: HookFunction, loops: Set[int] | None = None) -> Attached:
        """Attach ``fn``, at every loop if ``loops`` is None."""
        entry = Attached(loops, fn, set())
        self.entries += (entry,)
        return entry

    def remove(self, entry: Attached) -> None:
        """Detach what `add` returned; nothing happens if it is gone already."""
        self.entries = tuple(other for other in self.entries if other is not entry)

    def _fire(self, activation: Tensor) -> Tensor:
        if self.clock.muted:
            return activation
        loop = self.clock.loop
        for loops, fn, fired in self.entries:
            if loops is None or loop in loops:
                fired.add(loop)
                replacement = fn(activation, hook=self)
                if replacement is not None:
                    activation = replacement
        return activation
