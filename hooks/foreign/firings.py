"""Counting firings from the start of each forward: the state of one `hooks.foreign.watching`.

A `Run` resolves sites, hangs one torch hook on each name's module, and at each firing knows by counting which
loop it is. It compares the counts with the schedule when the forward ends, and then fills the recording.

    run = Run(module, "core.*.hook_out", recorder=Recorder)
    run.attach(places_of(module, schedule)); run.frame()
    try: module(x)                                # run.recording is filled
    finally: run.detach()
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from hooks.checkpointing import guard_recomputation, may_be_checkpointed
from hooks.edits import Edit, attachments
from hooks.foreign import payload
from hooks.foreign.discovery import discover, is_dry, random_state, random_state_kept, set_random_state
from hooks.foreign.places import Firing, Places, places_of
from hooks.hook_points import HookFunction, replacing
from hooks.recording import Recorder, Recording
from hooks.sites import SiteError, SitePattern

Hooks = Sequence[tuple[SitePattern, HookFunction] | Edit]

COMPILED = ("the module is compiled (torch.compile), and compiled code does not call Python hooks reliably: watch and "
            "call the original module, which shares its weights with the compiled one (compiled._orig_mod).")


UNCHECKPOINTED = "Switch checkpointing off (model.gradient_checkpointing_disable())."


class Watched(Recording):
    """The recording of a watch: holds the last forward that finished, and nothing before it or after a failed one."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.filled = False

    def __getitem__(self, site: str) -> Tensor:
        self._refuse_empty()
        return super().__getitem__(site)

    def stack(self, name: str) -> Tensor:
        self._refuse_empty()
        return super().stack(name)

    def take(self, other: Recording | None) -> None:
        """Hold what ``other`` holds, or nothing."""
        self.__dict__.update((other or Recording({}, {})).__dict__, filled=other is not None)

    def _refuse_empty(self) -> None:
        if not self.filled:
            raise SiteError("nothing is recorded: no forward of the watched module has finished since the block began, "
                            "or since one that failed.")


class Tap:
    """One name: how often it has fired in this forward, and what to call at each firing."""

    __slots__ = ("actions", "count", "firings", "name", "optional", "owner", "quiet")

    def __init__(self, name: str, owner: nn.Module, firings: tuple[Firing, ...]):
        self.name, self.owner, self.firings = name, owner, firings
        self.actions: list[list[Callable[..., Any]]] = [[] for _ in firings]
        self.count = 0
        self.optional = True   # named by wildcards only: may never fire
        self.quiet = True      # records only: a call outside a forward may pass unseen


class Run:
    """One watch. ``recorder`` makes the recorder of activations, and one of gradients for each forward."""

    def __init__(self, root: nn.Module, sites: SitePattern, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (),
                 gradients: bool = False, seed: int | None = None,
                 on_forward: Callable[[Recording], None] | None = None, *, recorder: Callable[[], Recorder]):
        self.root, self.sites, self.fwd_hooks, self.bwd_hooks = root, sites, fwd_hooks, bwd_hooks
        self.gradients, self.seed, self.on_forward = gradients, seed, on_forward
        self.new_recorder, self.recorder, self.backward = recorder, recorder(), recorder()
        self.recording = Watched()
        self.places: Places | None = None
        self.taps: dict[str, Tap] = {}
        self.asked: list[tuple[str, list[str]]] = []   # each pattern, and the names it stands for
        self.recorded: tuple[str, ...] = ()
        self.removers: list[Any] = []
        self.begin: Any = None
        self.active = self.detached = False
        self.strays = self.forwards = self.refused = 0
        self.thread = 0
        self.error: BaseException | None = None
        self.random: Any = None

    # ---- before

    def attach(self, places: Places) -> None:
        """Resolve every pattern and place the torch hooks; SiteError for what cannot fire."""
        self.places = places
        for pattern, fn in attachments(self.fwd_hooks, places.space):
            self._act(pattern, fn, quiet=False)
        if self.sites is None or isinstance(self.sites, (str, re.Pattern)) or callable(self.sites) or list(self.sites):
            self.recorded = tuple(self._act(self.sites, self.recorder))
            if self.gradients:
                self._act(self.sites, self._record_gradient, quiet=False)
        for pattern, fn in attachments(self.bwd_hooks, places.space):
            self._act(pattern, _on_backward(fn), quiet=False)
        for name, tap in self.taps.items():
            place = places.places[name]
            if place.kind == "in":
                hook = place.module.register_forward_pre_hook(self._on_input(tap), prepend=True, with_kwargs=True)
            else:
                hook = place.module.register_forward_hook(self._on_output(tap), prepend=True)
            self.removers.append(hook)

    def frame(self) -> None:
        """Mark where a forward begins, before every other hook of the root, and where it ends, after them."""
        self._mark_begin()
        self.removers.append(self.root.register_forward_hook(lambda *given: self._finish(), always_call=True))

    def _mark_begin(self) -> None:
        # A function, not a bound method: copy.deepcopy of the module then keeps pointing here, and is noticed.
        self.begin = self.root.register_forward_pre_hook(lambda *given: self._begin(*given),
                                                         prepend=True, with_kwargs=True)

    def detach(self) -> None:
        self.detached = True
        for remover in (*self.removers, *([self.begin] if self.begin else [])):
            remover.remove()

    def _act(self, pattern: SitePattern, fn: Callable[..., Any], quiet: bool = True) -> list[str]:
        assert self.places is not None
        chosen = self.places.choose(pattern)
        for name, indices in chosen.firings.items():
            if name not in self.taps:
                self.taps[name] = Tap(name, self.places.places[name].module, self.places.firings(name))
            tap = self.taps[name]
            tap.quiet &= quiet
            tap.optional &= name not in chosen.exact
            for index in range(len(tap.firings)) if indices is None else indices:
                tap.actions[index].append(fn)
        self.asked += chosen.asked
        return list(chosen.firings)

    def _record_gradient(self, activation: Tensor, *, hook: Firing) -> None:
        _refuse_without_gradient(activation, hook)
        backward = self.backward  # of this forward: a later one has its own
        activation.register_hook(lambda gradient: backward.backward(gradient, hook=hook))

    # ---- during

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_compiling():
            raise RuntimeError(COMPILED)
        if is_dry():
            return None
        if module is not self.root:
            raise RuntimeError(_replica("the watched module"))
        if self.active:
            self._refuse_overlap()
        late = self.places is None
        if late:
            with random_state_kept(self.seed):
                schedule = discover(module, args, kwargs).schedule
            self.attach(places_of(module, schedule))
            self.begin.remove()
            self._mark_begin()  # ahead of a tap on the root's own input
        for tap in self.taps.values():
            tap.count = 0
        self.recorder.recording({})  # what a failed forward left
        self.recording.take(None)
        if self.gradients:
            self.backward = self.new_recorder()
        self.error, self.thread = sys.exc_info()[1], threading.get_ident()
        if self.seed is not None:
            self.random = random_state()
            torch.manual_seed(self.seed)
        self.active = True
        if late and "hook_in" in self.taps and self.taps["hook_in"].owner is module:
            return self._on_input(self.taps["hook_in"])(module, args, kwargs)  # torch has listed the hooks it will run
        return None

    def _finish(self) -> None:
        if is_compiling():
            raise RuntimeError(COMPILED)
        if is_dry() or not self.active or self.thread != threading.get_ident():
            return
        if self.refused:  # the end of a forward that began inside this one, and was refused
            self.refused -= 1
            return
        self.active = False
        self.forwards += 1
        if self.seed is not None:
            set_random_state(self.random)
        if sys.exc_info()[1] is not self.error:  # the forward failed: its own error says why
            return
        silent = self._refuse_miscounts()
        assert self.places is not None
        names = {name: self.places.space.names[name] for name in self.recorded if name not in silent}
        done = self.recorder.recording(names)
        if self.gradients:
            live = self.backward.recording(names)
            live._held, live.axes = self.backward.gradients, self.backward.axes  # filled by the backward pass
            done.gradients = live
        self.recording.take(done)
        if self.on_forward is not None:
            self.on_forward(done)

    def _on_output(self, tap: Tap) -> Callable[..., Any]:
        conversion = tap.owner if hasattr(tap.owner, "hook_conversion") else None

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            functions = self._next(tap, module)
            if not functions:
                return None
            return self._applied(tap, functions, output, module, conversion)

        return hook

    def _on_input(self, tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            functions = self._next(tap, module)
            if not functions:
                return None
            given = kwargs if payload.find(args) is None else args
            changed = self._applied(tap, functions, given, module)
            return None if changed is None else (changed, kwargs) if given is args else (args, changed)

        return hook

    def _next(self, tap: Tap, module: nn.Module) -> list[Callable[..., Any]] | None:
        """What to call at this firing; counts it."""
        if is_compiling():  # seen while tracing only: the compiler then leaves this part to Python
            raise RuntimeError(COMPILED)
        if not self.active or is_dry():
            self._stray(tap)
            return None
        if module is not tap.owner:
            raise RuntimeError(_replica(tap.name))
        index = tap.count
        tap.count = index + 1
        if index >= len(tap.actions):
            raise RuntimeError(self._miscounted(tap, f"has now run {tap.count} times"))
        return tap.actions[index]

    def _applied(self, tap: Tap, functions: list[Callable[..., Any]], value: Any, module: nn.Module,
                 conversion: Any = None) -> Any:
        """``value`` with its tensor replaced by what the functions made of it, or None if they left it alone."""
        firing = tap.firings[tap.count - 1]
        where = () if isinstance(value, Tensor) else payload.find(value)
        if where is None:
            verb = "was given" if tap.name.endswith("hook_in") else "returned"
            raise TypeError(f"{firing.site}: {type(module).__name__} {verb} {_described(value)}, in which there is no "
                            "tensor to record or edit: watch a module inside it or around it.")
        before = payload.get(value, where) if where else value
        if conversion is not None and conversion.hook_conversion is not None:
            before = conversion.hook_conversion.convert(before)
        after = before
        for fn in functions:
            result = fn(after, hook=firing)
            if result is not None:
                after = replacing(result, after, firing.site)
                if may_be_checkpointed():
                    guard_recomputation(firing.site, lambda: not self.detached, remedy=UNCHECKPOINTED)
        if after is before and (conversion is None or conversion.hook_conversion is None or tap.quiet):
            return None  # (behind a conversion, gradients flow only where its result goes on)
        if conversion is not None and conversion.hook_conversion is not None:
            after = conversion.hook_conversion.revert(after)
        return payload.put(value, where, after)

    # ---- what went wrong

    def _refuse_overlap(self) -> None:
        inside = self.thread == threading.get_ident()
        self.refused += inside
        how = "inside its own forward (by a hook, or by itself)" if inside else "two threads at once"
        raise RuntimeError(f"the watched module was called from {how}, so that its firings cannot be told apart: "
                           "finish one forward before the next, or watch the module inside that is called in turn.")

    def _stray(self, tap: Tap) -> None:
        if is_dry():
            return
        self.strays += 1
        if not tap.quiet and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(f"{tap.name} is run again by the backward pass (gradient checkpointing), where edits "
                               "and gradients cannot follow: switch checkpointing off "
                               "(model.gradient_checkpointing_disable()).")

    def _refuse_miscounts(self) -> set[str]:
        """Names that never fired and need not have; RuntimeError for any other difference from the schedule."""
        silent: set[str] = set()
        for tap in self.taps.values():
            if tap.count != len(tap.firings):
                if tap.count or not tap.optional:
                    raise RuntimeError(self._miscounted(tap, f"ran {_times(tap.count)}"))
                silent.add(tap.name)
        if silent:
            for pattern, names in self.asked:
                if silent.issuperset(names):
                    raise RuntimeError(f"{pattern}: none of the {len(names)} sites that this names fired in the "
                                       f"forward, {names[0]} first: the model does not call them here. "
                                       "describe(module, inputs) lists what it calls.")
        return silent

    def _miscounted(self, tap: Tap, seen: str) -> str:
        where = tap.name if self.places and self.places.bridge else tap.name.rpartition("hook_")[0].rstrip(".")
        return (f"{where or 'the watched module'} should run {_times(len(tap.firings))} per forward by the schedule, "
                f"and {seen}: its loops cannot be told apart. Give watch the schedule of this forward, or run as many "
                "loops as it says; describe(module, inputs) prints how often each module is called.")

    def refuse_silence(self) -> None:
        if not self.forwards:
            raise RuntimeError("the watched module was not run in the block" + (
                ", although parts of it were" if self.strays else "") + ": call module(...) itself, not "
                "module.forward(...), a compiled copy of it, or a module around or inside it that you do not watch.")


# ------------------------------------------------------------------------ private

def _on_backward(fn: HookFunction) -> Callable[..., None]:
    def call(activation: Tensor, *, hook: Firing) -> None:
        _refuse_without_gradient(activation, hook)
        # a Firing answers name, loop and site, which is what hook functions ask a HookPoint
        def on_gradient(gradient: Tensor) -> Tensor | None:
            returned = fn(gradient, hook=hook)  # type: ignore[arg-type]
            return None if returned is None else replacing(returned, gradient, f"{hook.site} (gradient)")

        activation.register_hook(on_gradient)
    return call


def _refuse_without_gradient(activation: Tensor, hook: Firing) -> None:
    if not activation.requires_grad:
        raise RuntimeError(f"no gradient reaches {hook.site}: run the forward with gradients enabled and parameters "
                           "that require them; loops that the model itself runs under torch.no_grad() have none.")


def _replica(name: str) -> str:
    return (f"{name} ran as a copy (a DataParallel replica, or a deepcopy made under watch), whose firings would mix "
            "with the original's: call the original on one device (data_parallel.module), or copy before watching.")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return type(value).__name__
