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

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HookFunction(Protocol):
    """TransformerLens' signature: returns a replacement, or None to leave the value alone."""

    def __call__(self, activation: Tensor, /, *, hook: HookPoint) -> Tensor | None: ...


class LoopClock:
    """The loop that is running, shared by every hook point of a model.

    ``runs`` counts forwards, ``ran`` is the number of loops of the last one, and
    ``stopped_early`` says that it stopped adaptively before the loops it was allowed.
    While ``muted``, hook points are plain identities. ``thread`` is the one in which a forward runs,
    and ``within`` the hook (or other function of the caller) that this forward has called, if any.
    """

    __slots__ = ("loop", "muted", "ran", "runs", "stopped_early", "thread", "within")

    def __init__(self) -> None:
        self.loop = self.runs = self.ran = 0
        self.stopped_early = self.muted = False
        self.thread: int | None = None
        self.within: str | None = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """A copy, made in a hook for example, runs no forward."""
        return None, {**{name: getattr(self, name) for name in self.__slots__}, "thread": None, "within": None}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """For the length of a forward; RuntimeError inside another one, whose hooks would fire again."""
        self.refuse_inside()
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = None

    @contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """While a function of the caller runs that belongs to a forward: a hook, or a loss."""
        before = self.thread, self.within
        self.thread, self.within = threading.get_ident(), what
        try:
            yield
        finally:
            self.thread, self.within = before

    def refuse_inside(self) -> None:
        """RuntimeError if this thread is inside a forward."""
        if self.thread == threading.get_ident():
            raise RuntimeError(f"the model was run inside {self.within or 'its own forward'}: its sites would fire a "
                               "second time, and hooks would record and edit the wrong forward. Run it before or "
                               "after, or run another model there (copy.deepcopy(model), made beforehand).")

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
        clock = self.clock
        if clock.within is not None:
            raise RuntimeError(f"{self.site} fired inside {clock.within}, where a part of the model was run: the hooks "
                               "at this site would record and edit it in place of the forward's own. Run the part "
                               "after the forward, or leave its sites unhooked.")
        loop, thread = clock.loop, clock.thread
        for loops, fn, fired in self.entries:
            if loops is None or loop in loops:
                fired.add(loop)
                clock.thread, clock.within = threading.get_ident(), f"the hook at {self.name}"
                try:
                    replacement = fn(activation, hook=self)
                finally:
                    clock.thread, clock.within = thread, None
                if replacement is not None:
                    activation = replacement
        return activation
