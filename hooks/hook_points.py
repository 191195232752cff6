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
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from hooks.checkpointing import guard_recomputation, may_be_checkpointed, recomputing


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
    ``again`` holds the edits that a part of the model was under in its forward pass, while a backward pass
    runs that part again (`hooks.checkpointing`): no others act there.
    """

    __slots__ = ("again", "loop", "muted", "ran", "runs", "stopped_early", "thread", "within")

    def __init__(self) -> None:
        self.loop = self.runs = self.ran = 0
        self.stopped_early = self.muted = False
        self.again: tuple[object, ...] = ()

        self.thread: int | None = None
        self.within: str | None = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """A copy, made in a hook for example, runs no forward."""
        return None, {**{name: getattr(self, name) for name in self.__slots__}, "thread": None, "within": None,
                      "again": ()}

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
        if self.thread == threading.get_ident() and not recomputing():
            raise RuntimeError(f"the model was run inside {self.within or 'its own forward'}: its sites would fire a "
                               "second time, and hooks would record and edit the wrong forward. Run it before or "
                               "after, or run another model there (copy.deepcopy(model), made beforehand).")

    def edits_again(self, edit: object) -> bool:
        return any(other is edit for other in self.again)

    @contextmanager
    def repeating(self, edit: object, loop: int) -> Iterator[None]:
        """While a part of the model that ``edit`` acted on in ``loop`` is run again."""
        before = self.loop, self.again
        self.loop, self.again = loop, (*self.again, edit)
        try:
            yield
        finally:
            self.loop, self.again = before

    def finish(self, ran: int, allowed: int) -> None:
        """Note that a forward has run ``ran`` of ``allowed`` loops."""
        self.runs += 1
        self.ran, self.stopped_early = ran, ran < allowed


class Attached(NamedTuple):
    """A function at a hook point. ``fired`` collects the loops in which it was called."""

    loops: Set[int] | None   # None: every loop
    fn: HookFunction
    fired: set[int]


def replacing(returned: Any, value: Tensor, site: str) -> Tensor:
    """What a hook ``returned``, if it can stand in for ``value``; else TypeError or ValueError, naming the site.

    It must be a tensor of the same shape, dtype and device: another one might run on, broadcast or promoted, and mean
    something else.
    """
    if not isinstance(returned, Tensor):
        kind = type(returned).__name__
        if isinstance(returned, (tuple, list)):
            kind += f" of {', '.join(type(part).__name__ for part in returned) or 'nothing'}"
        raise TypeError(f"the hook at {site} returned a {kind}: return a tensor to replace the activation, or None to "
                        "leave it.")
    if returned.shape != value.shape:
        raise ValueError(f"the hook at {site} returned shape {tuple(returned.shape)}, the activation there has shape "
                         f"{tuple(value.shape)}: return the same shape (expand_as, if it should be broadcast).")
    if returned.dtype is not value.dtype or returned.device != value.device:
        raise ValueError(f"the hook at {site} returned {returned.dtype} on {returned.device}, the activation there is "
                         f"{value.dtype} on {value.device}: return value.to(activation).")
    return returned


class HookPoint:
    """An identity that calls the functions attached to it.

    ``name`` is the TransformerLens name; ``loop`` and ``site`` say which firing this is. A copy of a hook point
    (of a model that is copied or pickled) has nothing attached: hooks belong to the model on which they were placed.
    """

    __slots__ = ("clock", "entries", "looped", "name")

    def __init__(self, name: str, clock: LoopClock, looped: bool):
        self.name = name
        self.clock = clock
        self.looped = looped
        self.entries: tuple[Attached, ...] = ()

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        return None, {"name": self.name, "clock": self.clock, "looped": self.looped, "entries": ()}

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
        loop, thread, again = clock.loop, clock.thread, recomputing()
        if clock.within is not None and not again:
            raise RuntimeError(f"{self.site} fired inside {clock.within}, where a part of the model was run: the hooks "
                               "at this site would record and edit it in place of the forward's own. Run the part "
                               "after the forward, or leave its sites unhooked.")
        within = clock.within
        for entry in self.entries:
            loops, fn, fired = entry
            if (loops is None or loop in loops) and (not again or clock.edits_again(entry)):
                fired.add(loop)
                clock.thread, clock.within = threading.get_ident(), f"the hook at {self.name}"
                try:
                    replacement = fn(activation, hook=self)
                finally:
                    clock.thread, clock.within = thread, within
                if replacement is not None:
                    activation = replacing(replacement, activation, self.site)
                    if may_be_checkpointed():
                        guard_recomputation(self.site, partial(self._holds, entry),
                                            around=partial(clock.repeating, entry, loop))
        return activation

    def _holds(self, entry: Attached) -> bool:
        return any(other is entry for other in self.entries)
