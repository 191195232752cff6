"""watch: per-loop recording and editing of any looped ``nn.Module`` or TransformerLens bridge.

The names of places are ``{module.path}.hook_in`` and ``.hook_out`` (a bridge's own hook names), with
``@loop`` where a module runs more than once per forward: ``@3``, or ``@h1.l0`` in nested cycles. Which loop
a firing is follows from counting the calls of the looped module around it, from the start of each forward, against a
schedule (`hooks.foreign.schedules`); without one, a dry run of the first forward discovers the counts
(`hooks.foreign.discovery`).

    with watch(model, "core_block.*.hook_out", schedule={"core_block": 8}) as rec:
        model(tokens)
    rec["core_block.1.hook_out@-1"]                           # also rec.stack(...), as any Recording

    with watch(model, "coda.0.hook_in", fwd_hooks=[("core_block.1.hook_out@3", fn)], gradients=True) as rec:
        model(tokens).logits.sum().backward()                 # rec.gradients["coda.0.hook_in"]

    with watch(model, "core.*.hook_out@-1", schedule={"core": UpTo(16)}) as rec:    # the data decide when it halts
        model(tokens)

Where a module takes or returns a tuple or a dict, the site is the hidden state in it (`hooks.foreign.payload`), and
each element is a site too, by index or key: ``attn.hook_out.1`` (attention weights), ``lstm.hook_out.1.0``. Calls
outside a forward of the watched module do not count. Of nested watches, the inner one acts first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hooks.edits import PlanEdit
from hooks.foreign.discovery import modules_of
from hooks.foreign.firings import Hooks, Run
from hooks.foreign.layouts import Declared
from hooks.foreign.places import places_of
from hooks.foreign.schedules import Cycles, Schedule, Scheduled, schedule_of
from hooks.foreign.watched import Watched
from hooks.recording import Cut, Recorder, Recording, Reducer
from hooks.sites import SitePattern


@contextmanager
def watch(module: nn.Module, sites: SitePattern = None, *,
          schedule: Scheduled | Mapping[str, Cycles] | None = None, axes: Declared = None,
          fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), gradients: bool = False,
          reduce: Reducer | None = None, pos_slice: Cut | None = None, batch_slice: Cut | None = None,
          dtype: torch.dtype | None = None, device: torch.device | str | None = None,
          seed: int | None = None, on_forward: Callable[[Recording], None] | None = None) -> Iterator[Watched]:
    """Record ``sites`` (default all; () for none) of every forward of ``module`` in the block, loop by loop.

    ``schedule`` says which modules loop: `Schedule` or the mapping that makes one, or a ``describe(...).schedule``.
    By default it is that of a known architecture, else that of a dry run on the inputs of the first forward.
    ``axes`` names the axes of the module's hidden states where they are not [batch, pos, d_model] and not those of a
    module of torch's own, for all (``("pos", "batch", "d_model")``, ``("batch", "d_model")``) or by site
    (``{"core.**": …}``); hooks, edits, reducers and recordings see [batch, pos, d_model] (`hooks.foreign.layouts`).
    ``fwd_hooks`` are (sites, fn) pairs, called as ``fn(activation, hook=firing)`` with ``firing.site``, ``.name``
    and ``.loop``, and may return a replacement; site edits of `hooks.edits` work too. Recording sees their
    result. ``bwd_hooks`` get gradients, and ``gradients=True`` records those of ``sites`` in ``rec.gradients``
    when a backward pass runs. ``reduce`` to ``device`` shape the copy, as in `hooks.recording.Recorder`.
    ``seed`` seeds torch's random state for each forward and restores it afterwards: the same initial state
    each time in a model that draws one. ``on_forward`` gets the recording of each forward as it ends, for
    loops such as generation; the block's recording always is that of the last one.

    In the block compiled code runs as plain Python. Raises SiteError for sites that cannot fire (before the
    forward), ValueError for modules whose calls Python cannot see (compiled, scripted) and for axes that contradict the
    shape of the input, TypeError for an element that is not there, RuntimeError for a module
    that ran another number of times than the schedule says, for a forward inside a forward, for replicas, and
    for a block in which nothing ran.
    Of what only a wildcard names, sites that never fire are left out, and so are modules that give no tensor or whose
    calls cannot be told apart by loop (a Dropout that a layer uses twice): ``rec.left_out`` says why. Edits act on
    every call in their loop there. ``rec.absent`` lists the sites of hooks that the forward did not reach, where the
    schedule leaves that open (`UpTo`). All hooks are removed when the block ends, also while another thread runs
    the module.
    """
    if any(isinstance(entry, PlanEdit) for entry in fwd_hooks):
        raise ValueError("skipping, repeating and swapping loops needs a model that can re-plan its run "
                         "(HookedLoopMDM): under watch, edit at sites.")
    if isinstance(schedule, Mapping):
        schedule = Schedule(schedule)
    run = Run(module, sites, fwd_hooks, bwd_hooks, gradients, seed, on_forward, axes,
              recorder=lambda: Recorder(reduce=reduce, pos=pos_slice, batch=batch_slice, dtype=dtype, device=device))
    if gradients and getattr(reduce, "forward_only", False):
        raise ValueError(f"{type(reduce).__name__} compares a loop with the one before it, and a backward pass "
                         "visits loops in reverse: record gradients without it.")
    schedule = schedule_of(module) if schedule is None else schedule
    try:
        if schedule is None:
            modules_of(module)  # refuses what cannot be watched
        else:
            run.attach(places_of(module, schedule))
        run.frame()
        with _uncompiled():
            yield run.recording
    finally:
        run.detach()
    run.refuse_silence()


# ------------------------------------------------------------------------ private


def _uncompiled() -> AbstractContextManager[Any]:
    """Inside it, compiled functions that call a watched module run as plain Python, so that its hooks are called."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled yet; importing it takes a second
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


__all__ = ["Watched", "watch"]
