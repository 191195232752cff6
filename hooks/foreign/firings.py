"""Calling hooks at the right firings of each forward, and recording them: the state of one `hooks.foreign.watching`.

A `Run` resolves sites, hangs one torch hook on each name's module, and at each firing knows by counting which
loop it is (`hooks.foreign.counting`). It compares the counts with the schedule when the forward ends, and then fills
the recording. Other threads may run the model meanwhile: once `detach` has begun, nothing is attached any more.

    run = Run(module, "core.*.hook_out", recorder=Recorder)
    run.attach(places_of(module, schedule)); run.frame()
    try: module(x)                                # run.recording is filled
    finally: run.detach()
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from hooks.checkpointing import guard_recomputation, may_be_checkpointed
from hooks.edits import Edit, attachments
from hooks.foreign import payload
from hooks.foreign.counting import Counter, times
from hooks.foreign.discovery import (
    COMPILED,
    HOOKING,
    discover,
    is_dry,
    random_state,
    random_state_kept,
    set_random_state,
)
from hooks.foreign.layouts import Declared, Layouts, StateLayout, is_attention
from hooks.foreign.places import Choice, Firing, Place, Places, places_of
from hooks.foreign.watched import Watched
from hooks.hook_points import HookFunction, replacing
from hooks.recording import Recorder, Recording, axes_of
from hooks.sites import Site, SiteError, SitePattern, SiteSpace

Hooks = Sequence[tuple[SitePattern, HookFunction] | Edit]

UNCHECKPOINTED = "Switch checkpointing off (model.gradient_checkpointing_disable())."


class Tap:
    """One name: what to call at each of its firings."""

    __slots__ = ("actions", "axes", "counter", "firings", "layout", "name", "optional", "owner", "place", "quiet",
                 "shape", "unusable")

    def __init__(self, name: str, place: Place, firings: tuple[Firing, ...], counter: Counter):
        self.name, self.owner, self.place, self.firings, self.counter = name, place.module, place, firings, counter
        self.shape: Any = None                   # of the state whose layout is known
        self.layout: StateLayout | None = None   # how to turn it to [batch, pos, d_model]; None: it is so
        self.axes: tuple[str, ...] | None = None  # where they are not those that the name implies
        self.actions: list[list[Callable[..., Any]]] = [[] for _ in firings]
        self.optional = True   # named by wildcards only: may never fire
        self.quiet = True      # records only: a call outside a forward may pass unseen
        self.unusable = ""     # why it cannot be recorded in this forward


class Run:
    """One watch. ``recorder`` makes the recorder of activations, and one of gradients for each forward."""

    def __init__(self, root: nn.Module, sites: SitePattern, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (),
                 gradients: bool = False, seed: int | None = None,
                 on_forward: Callable[[Recording], None] | None = None, axes: Declared = None, *,
                 recorder: Callable[[], Recorder]):
        self.root, self.sites, self.fwd_hooks, self.bwd_hooks = root, sites, fwd_hooks, bwd_hooks
        self.gradients, self.seed, self.on_forward, self.declared = gradients, seed, on_forward, axes
        self.layouts = Layouts({}, axes)  # of the modules, once they are known
        self.new_recorder, self.recorder, self.backward = recorder, recorder(), recorder()
        self.unkept: set[str] = set()  # names and sites whose gradients are not to be kept
        self.recording = Watched()
        self.begin: Any = None
        self.removers: list[Any] = []
        self.active = self.closed = False
        self.strays = self.forwards = self.refused = 0
        self.thread = 0
        self.error: BaseException | None = None
        self.random: Any = None
        self._forget()

    def _forget(self) -> None:
        self.places: Places | None = None
        self.taps: dict[str, Tap] = {}
        self.counters: dict[str, Counter] = {}         # of the looped modules that number others
        self.asked: list[tuple[str, dict[str, tuple[int, ...] | None]]] = []   # each pattern, and its firings
        self.hooked: dict[str, set[int]] = {}          # the firings at which hooks of the user's act
        self.recorded: Choice | None = None

    # ---- before

    def attach(self, places: Places) -> None:
        """Resolve every pattern and place the torch hooks; SiteError for what cannot fire, and then none are left."""
        with HOOKING:
            if self.closed:
                return
            already = len(self.removers)
            try:
                self._attach(places)
            except BaseException:
                for remover in self.removers[already:]:
                    remover.remove()
                del self.removers[already:]
                self._forget()
                raise

    def _attach(self, places: Places) -> None:
        self.places, self.layouts = places, Layouts(places.modules, self.declared)
        for pattern, fn in attachments(self.fwd_hooks, places.space):
            self._note(self._act(pattern, fn, quiet=False))
        if self.sites is None or isinstance(self.sites, (str, re.Pattern)) or callable(self.sites) or list(self.sites):
            self.recorded = self._act(self.sites, self.recorder, from_end=True)
            if self.gradients:
                self._act(self.sites, self._record_gradient, quiet=False, from_end=True)
        for pattern, fn in attachments(self.bwd_hooks, places.space):
            self._note(self._act(pattern, _on_backward(fn), quiet=False))
        for tap in self.taps.values():
            if tap.place.kind == "in":
                hook = tap.owner.register_forward_pre_hook(self._on_input(tap), prepend=True, with_kwargs=True)
            else:
                hook = tap.owner.register_forward_hook(self._on_output(tap), prepend=True)
            self.removers.append(hook)

    def frame(self) -> None:
        """Mark where a forward begins, before every other hook of the root, and where it ends, after them."""
        with HOOKING:
            self._mark_begin()
            self.removers.append(self.root.register_forward_hook(lambda *given: self._finish(), always_call=True))

    def _mark_begin(self) -> None:
        # A function, not a bound method: copy.deepcopy of the module then keeps pointing here, and is noticed.
        self.begin = self.root.register_forward_pre_hook(lambda *given: self._begin(*given),
                                                         prepend=True, with_kwargs=True)

    def detach(self) -> None:
        """Remove every hook. Whatever another thread is doing, none is attached from now on."""
        with HOOKING:
            self.closed = True
            for remover in (*self.removers, *([self.begin] if self.begin else [])):
                remover.remove()
            if self.active and self.random is not None:  # a forward that will not come to `_finish`
                set_random_state(self.random)

    def _act(self, pattern: SitePattern, fn: Callable[..., Any], quiet: bool = True, from_end: bool = False) -> Choice:
        assert self.places is not None
        chosen = self.places.choose(pattern, from_end=from_end)
        for name, indices in chosen.firings.items():
            if name not in self.taps:
                place = self.places.place(name)
                self.taps[name] = Tap(name, place, self.places.firings(name), self._counter(place.path))
            tap = self.taps[name]
            tap.quiet &= quiet
            tap.optional &= name not in chosen.exact
            for index in range(len(tap.firings)) if indices is None else indices:
                tap.actions[index].append(fn)
        self.asked += chosen.asked
        return chosen

    def _note(self, chosen: Choice) -> None:
        for name, indices in chosen.firings.items():
            self.hooked.setdefault(name, set()).update(range(len(self.taps[name].firings))
                                                       if indices is None else indices)

    def _counter(self, path: str) -> Counter:
        """A counter of a name's own, numbered by the looped module around it if there is one."""
        assert self.places is not None
        numbering = self.places.numbering(path)
        return Counter(path, numbering, self._numbering_counter(numbering.by) if numbering.by else None)

    def _numbering_counter(self, path: str) -> Counter:
        assert self.places is not None
        if path not in self.counters:
            counter = self.counters[path] = self._counter(path)

            def enter(module: nn.Module, args: Any) -> None:
                if self.active and self.thread == get_ident() and not is_dry():
                    counter.enter()

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                if counter.depth and self.thread == get_ident() and not is_dry():
                    counter.leave()

            module = self.places.modules[path]
            self.removers.append(module.register_forward_pre_hook(enter, prepend=True))
            self.removers.append(module.register_forward_hook(leave, prepend=True, always_call=True))
        return self.counters[path]

    def _record_gradient(self, activation: Tensor, *, hook: Firing) -> None:
        _refuse_without_gradient(activation, hook)
        backward, unkept = self.backward, self.unkept  # of this forward: a later one has its own

        def keep(gradient: Tensor) -> None:
            if hook.site not in unkept and hook.name not in unkept:
                backward.backward(gradient, hook=hook)

        activation.register_hook(keep)

    # ---- during

    def _begin(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if is_compiling():
            raise RuntimeError(COMPILED)
        if is_dry() or self.closed or kwargs is None:  # None: torch, in a thread, while the hook comes or goes
            return None
        if module is not self.root:
            raise RuntimeError(_replica("the watched module"))
        with HOOKING:
            if self.active:
                self._refuse_overlap()
            self.active, self.thread = True, get_ident()
        late = self.places is None
        if late:
            try:
                self._discover(module, args, kwargs)
            except BaseException:
                self.active = False
                raise
            if self.closed:  # the block has ended meanwhile
                self.active = False
                return None
        reshaped = self.layouts.begin(args, kwargs)
        for tap in self.taps.values():
            tap.counter.restart()
            tap.unusable = ""
            if reshaped:
                tap.shape = None
        for counter in self.counters.values():
            counter.restart()
        self.recorder.recording({})  # what a failed forward left
        if not payload.REPLAYING.on:  # what is recorded is the last whole forward
            self.recording.take(None)
        if self.gradients:
            self.backward, self.unkept = self.new_recorder(), set()
        self.error = sys.exc_info()[1]
        if self.seed is not None:
            self.random = random_state()
            torch.manual_seed(self.seed)
        if late and "hook_in" in self.taps and self.taps["hook_in"].owner is module:
            return self._on_input(self.taps["hook_in"])(module, args, kwargs)  # torch has listed the hooks it will run
        return None

    def _discover(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        with random_state_kept(self.seed):
            schedule = discover(module, args, kwargs).schedule
        with HOOKING:
            self.attach(places_of(module, schedule))
            if not self.closed:
                self.begin.remove()
                self._mark_begin()  # ahead of a tap on the root's own input

    def _finish(self) -> None:
        if is_compiling():
            raise RuntimeError(COMPILED)
        if not self._is_on():
            return
        if self.refused:  # the end of a forward that began inside this one, and was refused
            self.refused -= 1
            return
        self.active = False
        if self.closed:  # the block ended while another thread was in this forward
            return
        if self.seed is not None:
            set_random_state(self.random)
        self.forwards += 1
        if sys.exc_info()[1] is not self.error:  # the forward failed: its own error says why
            return
        if payload.REPLAYING.on:  # only some of the layers ran
            return
        done = self._recorded()
        self.recording.take(done)
        if self.on_forward is not None:
            self.on_forward(done)

    def _on_output(self, tap: Tap) -> Callable[..., Any]:
        conversion = tap.owner if hasattr(tap.owner, "hook_conversion") else None

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            index = self._next(tap, module)
            if index is None or not tap.actions[index] or (
                    payload.REPLAYING.on and output is payload.REPLAYING.answer):
                return None
            return self._applied(tap, index, output, module, conversion)

        return hook

    def _on_input(self, tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
            index = self._next(tap, module)
            if index is None or kwargs is None or not tap.actions[index]:
                return None
            given = self._given(tap, module, args, kwargs)
            changed = self._applied(tap, index, given, module)
            return None if changed is None else (changed, kwargs) if given is args else (args, changed)

        return hook

    def _is_on(self) -> bool:
        """Is this thread in a forward that counts? (Another may run the model too, in a forward begun before.)"""
        return self.active and self.thread == get_ident() and not is_dry()

    def _next(self, tap: Tap, module: nn.Module) -> int | None:
        """Counts this firing; its number, or None outside of a forward."""
        if is_compiling():  # seen while tracing only: the compiler then leaves this part to Python
            raise RuntimeError(COMPILED)
        if self.active and module is not tap.owner:
            raise RuntimeError(_replica(tap.name))
        if not self.active or self.thread != get_ident() or is_dry():
            self._stray(tap)
            return None
        counter = tap.counter
        index = counter.step()
        if index >= len(tap.actions) or counter.crowded:
            if tap.optional and (reason := counter.unnumbered()):
                index = min(index, len(tap.actions) - 1)  # edits that a wildcard found act on every call in their loop
                tap.unusable = reason
            elif counter.crowded:
                raise RuntimeError(self._unnumbered(tap, counter.unnumbered() or ""))
            else:
                raise RuntimeError(self._miscounted(counter, f"has now run {times(counter.calls)}"))
        return index

    def _applied(self, tap: Tap, index: int, value: Any, module: nn.Module, conversion: Any = None) -> Any:
        """``value`` with its tensor replaced by what the functions made of it, or None if they left it alone."""
        where = () if tap.place.element is None and isinstance(value, Tensor) else self._where(tap, value)
        if where is None:
            reason = f"{tap.firings[index].site}: {type(module).__name__} {_without_tensor(tap.place, value)}"
            if not tap.optional:
                raise TypeError(reason)
            tap.unusable = reason
            return None
        before = payload.get(value, where) if where else value
        if conversion is not None and conversion.hook_conversion is not None:
            before = conversion.hook_conversion.convert(before)
        if before.shape != tap.shape:
            self._settle(tap, before)
        if tap.layout is not None:
            before = tap.layout.canonical(before)
        firing, after = tap.firings[index], before
        for fn in tap.actions[index]:
            result = fn(after, hook=firing)
            if result is not None:
                after = replacing(result, after, firing.site)
                if may_be_checkpointed():
                    guard_recomputation(firing.site, lambda: not self.closed, remedy=UNCHECKPOINTED)
        turned = tap.layout is not None or (conversion is not None and conversion.hook_conversion is not None)
        if after is before and (tap.quiet or not turned):
            return None  # (behind a view or a conversion, gradients flow only where its result goes on)
        if tap.layout is not None:
            after = tap.layout.original(after)
        if conversion is not None and conversion.hook_conversion is not None:
            after = conversion.hook_conversion.revert(after)
        return payload.put(value, where, after)

    def _where(self, tap: Tap, value: Any) -> payload.Where | None:
        """Where the tensor of this site is in what a module takes or returns."""
        return payload.find(value) if tap.place.element is None else payload.element(value, tap.place.element)

    def _given(self, tap: Tap, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Those inputs, by place or by name, that hold the tensor of this site; an element may have either name."""
        if tap.place.element is None:
            return kwargs if payload.find(args) is None else args
        first, _, rest = tap.place.element.partition(".")
        names = list(inspect.signature(module.forward).parameters)
        if not first.isdecimal() and first not in kwargs and first in names:
            first = str(names.index(first))
        elif first.isdecimal() and int(first) >= len(args) and int(first) < len(names):
            first = names[int(first)]
        tap.place = tap.place._replace(element=f"{first}.{rest}".rstrip("."))
        return args if first.isdecimal() else kwargs

    def _settle(self, tap: Tap, state: Tensor) -> None:
        """Find out which axis of the state is which."""
        layout = self.layouts.of(tap.name, tap.place, state)
        axes = None if layout.axes == axes_of(tap.name) else layout.axes
        if axes != tap.axes:
            tap.firings = tuple(replace(firing, axes=axes) for firing in tap.firings)
        tap.shape, tap.axes, tap.layout = state.shape, axes, None if layout.is_canonical else layout

    # ---- after

    def _recorded(self) -> Recording:
        """What the recorder holds, labelled; RuntimeError if the forward was not as the schedule says."""
        left_out, silent = self._judged()
        assert self.places is not None
        firings = self.recorded.firings if self.recorded else {}
        names = {name: self.taps[name].counter.axes() for name in firings
                 if name not in silent and name not in left_out}
        space = SiteSpace(names, self._never_came(names), guessed=self.places.space.guessed, aliases={
            alias: name for alias, name in self.places.space.aliases.items() if name in names})
        self.unkept |= {*left_out, *self._unchosen(space)}
        if self.unkept:
            self.recorder.held = {site: value for site, value in self.recorder.held.items()
                                  if site not in self.unkept and site.partition("@")[0] not in self.unkept}
        self.layouts.refuse_misfit()
        done = self.recorder.recording(space)
        done.axes = {**{name: axes for name in names if (axes := self.taps[name].axes)}, **done.axes}
        if self.gradients:
            live = self.backward.recording(space)
            live._held, live.axes = self.backward.gradients, self.backward.axes  # filled by the backward pass
            done.gradients = live
        done.left_out = {name: left_out[name] for name in left_out if name in firings}
        done.absent = tuple(tap.firings[i].site for name, indices in self.hooked.items()
                            if (tap := self.taps[name]) and name not in left_out
                            and (name not in silent or tap.counter.open_ended)
                            for i in sorted(indices) if not tap.counter.reached(i))
        return done

    def _never_came(self, names: dict[str, Any]) -> set[Site]:
        """Firings that the loops of this forward would have, and that the model left out."""
        assert self.places is not None
        absent = set()
        for name in names:
            counter = self.taps[name].counter
            if counter.numbered_by_another:
                index = self.places.layout.index(name)
                absent |= {site for site in SiteSpace({name: names[name]}).firings(name)
                           if not counter.reached(index[site])}
        return absent

    def _unchosen(self, space: SiteSpace) -> set[str]:
        """Sites recorded only because it was not known which loop is the last."""
        if self.recorded is None or not self.recorded.from_end:
            return set()
        back = {name for name, _ in self.recorded.from_end if name in space.names}
        kept = {str(site) for name, at in self.recorded.from_end if name in back
                for site in _if_any(space, f"{name}@{at}")}
        kept |= {self.taps[name].firings[i].site for name, i in self.recorded.outright if name in back}
        return {str(site) for name in back for site in space.firings(name)} - kept

    # ---- what went wrong

    def _refuse_overlap(self) -> None:
        inside = self.thread == get_ident()
        self.refused += inside
        how = "inside its own forward (by a hook, or by itself)" if inside else "two threads at once"
        raise RuntimeError(f"the watched module was called from {how}, so that its firings cannot be told apart: "
                           "finish one forward before the next, or watch the module inside that is called in turn.")

    def _stray(self, tap: Tap) -> None:
        if is_dry() or self.closed:
            return
        self.strays += 1
        if not tap.quiet and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(f"{tap.name} is run again by the backward pass (gradient checkpointing), where edits "
                               "and gradients cannot follow: switch checkpointing off "
                               "(model.gradient_checkpointing_disable()).")

    def _judged(self) -> tuple[dict[str, str], set[str]]:
        """Names that only wildcards found: why some cannot be recorded, and which never fired.

        RuntimeError for any other difference from the schedule.
        """
        left_out: dict[str, str] = {}
        silent: set[str] = set()
        for counter in self.counters.values():
            if counter.entered and (ran := counter.miscounted()):
                raise RuntimeError(self._miscounted(counter, ran))
        for tap in self.taps.values():
            counter = tap.counter
            if reason := counter.unnumbered():
                tap.unusable = self._unnumbered(tap, reason)
                if not tap.optional:
                    raise RuntimeError(tap.unusable)
            if tap.unusable:
                left_out[tap.name] = tap.unusable
            elif not counter.calls and (tap.optional or counter.open_ended):
                silent.add(tap.name)
            elif ran := counter.miscounted() if counter.calls else "ran 0 times":
                raise RuntimeError(self._miscounted(counter, ran))
        for pattern, firings in self.asked:
            self._refuse_unreached(pattern, firings, left_out)
        return left_out, silent

    def _refuse_unreached(self, pattern: str, firings: dict[str, tuple[int, ...] | None],
                          left_out: dict[str, str]) -> None:
        """RuntimeError if nothing that a pattern names came, unless the schedule leaves open what comes."""
        counters = [(self.taps[name].counter, indices) for name, indices in firings.items() if name not in left_out]
        if any(counter.open_ended or (counter.calls if indices is None else any(map(counter.reached, indices)))
               for counter, indices in counters):
            return
        first, indices = next(iter(firings.items()))
        if reasons := [left_out[name] for name in firings if name in left_out]:
            raise RuntimeError(f"{pattern}: nothing that this names can be recorded or edited. {reasons[0]}")
        if any(counter.calls for counter, _ in counters):
            site = self.taps[first].firings[indices[0] if indices else 0].site
            raise RuntimeError(f"{pattern}: the forward did not come to {site}: {first} runs in some of the loops "
                               "only, and not in that one. If this depends on the data, declare it with UpTo: then it "
                               "is reported in recording.absent.")
        raise RuntimeError(f"{pattern}: none of the {len(firings)} sites that this names fired in the "
                           f"forward, {first} first: the model does not call them here. "
                           "describe(module, inputs) lists what it calls.")

    def _miscounted(self, counter: Counter, seen: str) -> str:
        at_most = "up to " * counter.open_ended
        return (f"{self._shown(counter.path)} should run {at_most}{times(counter.total)} per forward by the schedule, "
                f"and {seen}: its loops cannot be told apart. Give watch the schedule of this forward, or run as many "
                "loops as it says; describe(module, inputs) prints how often each module is called. A number that "
                "depends on the data is declared as UpTo(the most).")

    def _unnumbered(self, tap: Tap, reason: str) -> str:
        counter = tap.counter
        declared = dict(counter.numbering.axes)
        if len(declared) == 1:
            declared = {next(iter(declared)) or "k": next(iter(declared.values()))}
        remedy = {**declared, "c": counter.most} if counter.crowded else counter.alone
        return (f"{tap.name}: {self._shown(tap.place.path)} {reason}, so that its calls cannot be told apart by loop. "
                f"Declare them: Schedule({{{tap.place.path!r}: {remedy!r}}}), beside what it says already.")

    def _shown(self, path: str) -> str:
        return path or "the watched module"

    def refuse_silence(self) -> None:
        if not self.forwards:
            raise RuntimeError("the watched module was not run in the block" + (
                ", although parts of it were" if self.strays else "") + ": call module(...) itself, not "
                "module.forward(...), a compiled copy of it, or a module around or inside it that you do not watch.")


# ------------------------------------------------------------------------ private

def _on_backward(fn: HookFunction) -> Callable[..., None]:
    def call(activation: Tensor, *, hook: Firing) -> None:
        _refuse_without_gradient(activation, hook)
        # hook functions ask a HookPoint for name, loop and site, and a Firing answers the same
        def on_gradient(gradient: Tensor) -> Tensor | None:
            returned = fn(gradient, hook=hook)  # type: ignore[arg-type]  # a Firing, see above
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


def _if_any(space: SiteSpace, pattern: str) -> list[Site]:
    try:
        return space.resolve(pattern)
    except SiteError:  # fewer loops came than are counted back
        return []


def _without_tensor(place: Place, value: Any) -> str:
    """What is said where a site's tensor is not there."""
    given = f"{'was given' if place.kind == 'in' else 'returned'} {_described(value)}, in which"
    if place.element is None:
        return f"{given} there is no tensor to record or edit: watch a module inside it or around it."
    there = ", ".join(f".{name}" for name, _ in payload.tensors(value)) or "none"
    eager = (" Attention weights are returned by eager attention only: load the model with "
             'attn_implementation="eager".') if is_attention(place) else ""
    return f"{given} .{place.element} is no tensor; there are {there}.{eager}"


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return type(value).__name__
