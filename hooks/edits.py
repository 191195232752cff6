"""Interventions as values: patch, copy, ablate, steer, freeze; skip, repeat and swap.

An edit goes wherever a hook goes, alone or with others, and is undone when the block ends:

    logits = model.run_with_hooks(tokens, 8, fwd_hooks=[steer("blocks.2.hook_resid_post@3", v), skip_loop(5)])
    with edit(model, [patch("blocks.2.hook_resid_post@3", rec, at=slice(0, 12)), freeze(4)], n_loops=8):
        logits, after = model.run_with_cache(tokens, 8)

**Site edits** write at sites, in the order in which they are listed; they work on anything that has
sites, `hooks.watch` included. **Plan edits** change which loops and layers run (see `hooks.plan`), each on the
plan that those before it left; sites then name the passes of the resulting run. ``at`` limits an edit to
positions (a slice, indices, or booleans [pos] or [batch, pos]); in attention patterns it means the queries.
``step`` limits it to denoising steps, in `hooks.model.diffusion.sample` and `hooks.model.sampling.record_sampling`:

    sample(model, prompt, SamplerConfig(n_steps=8), fwd_hooks=[freeze(2, step=0), skip_loop(-1, step=slice(4, None))])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.hook_points import HookFunction
from hooks.plan import At, Pass, Plan, Positions, Replan
from hooks.recording import axes_at
from hooks.sites import Site, SiteError, SitePattern, SiteSpace, split

Attachments = list[tuple[SitePattern, HookFunction]]

Steps = int | slice | Sequence[int]
"""Denoising steps: one (−1 is the last), a slice of them, or several."""


@dataclass(frozen=True)
class SiteEdit:
    """Writes at sites. ``attach`` makes its hooks for one run, checking before it what can be checked.

    ``step`` limits it to some denoising steps of a sampler; None is every forward.
    """

    name: str
    attach: Callable[[SiteSpace], Attachments]
    step: Steps | None = None


@dataclass(frozen=True)
class PlanEdit:
    """Changes which loops and layers run, in which order. ``step`` is that of a `SiteEdit`."""

    name: str
    replan: Replan
    step: Steps | None = None


Edit = SiteEdit | PlanEdit


@contextmanager
def edit(model: Any, edits: Iterable[Edit], n_loops: int | None = None) -> Iterator[Any]:
    """``edits`` are in force in the block, for forwards of ``n_loops`` loops (counted before any plan edit)."""
    with model.hooks(fwd_hooks=list(edits), n_loops=n_loops):
        yield model


def attachments(hooks: Iterable[tuple[SitePattern, HookFunction] | Edit], space: SiteSpace) -> Attachments:
    """The plain (pattern, function) pairs of ``hooks``, site edits expanded; plan edits are the model's affair."""
    pairs: Attachments = []
    for entry in hooks:
        if isinstance(entry, (SiteEdit, PlanEdit)) and entry.step is not None:
            raise ValueError(f"{entry.name!r} is addressed to denoising step {_written(entry.step)}, and a forward by "
                             "itself is no step: give it to sample or record_sampling, as fwd_hooks.")
        if isinstance(entry, SiteEdit):
            pairs.extend(entry.attach(space))
        elif not isinstance(entry, PlanEdit):
            pairs.append(entry)
    return pairs


def in_step(hooks: Iterable[tuple[SitePattern, HookFunction] | Edit], step: int,
            n_steps: int) -> list[tuple[SitePattern, HookFunction] | Edit]:
    """What of ``hooks`` acts in denoising step ``step`` of ``n_steps``, no longer limited to it.

    Raises SiteError for an edit of a step that never comes.
    """
    acting: list[tuple[SitePattern, HookFunction] | Edit] = []
    for entry in hooks:
        if not isinstance(entry, (SiteEdit, PlanEdit)) or entry.step is None:
            acting.append(entry)
        elif step in _steps(entry, n_steps):
            acting.append(replace(entry, step=None))
    return acting


# --------------------------------------------------------------------- at sites


def patch(site: SitePattern, source: Tensor | Mapping[str, Tensor], *, source_site: str | None = None,
          at: At | None = None, step: Steps | None = None) -> SiteEdit:
    """Replace the activation by one from elsewhere: a tensor, or a recording of another run.

    A recording is read at the same site, or at ``source_site`` (another loop, another layer).
    Raises SiteError before the run if it holds no such site, ValueError where shapes differ.
    """
    site = _again(site)

    def attach(space: SiteSpace) -> Attachments:
        values = {(s := str(found)): source if isinstance(source, Tensor) else source[source_site or s]
                  for found in space.resolve(site)}

        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            value = values[hook.site]
            if value.shape != activation.shape:
                raise ValueError(f"the patch for {hook.site} has shape {tuple(value.shape)}, the activation "
                                 f"{tuple(activation.shape)}: patch between runs of the same shape, unsliced.")
            return _placed(value.to(activation), activation, hook, at)

        return [(site, write)]

    return SiteEdit(f"patch {site}", attach, step)


def copy(source: str, target: SitePattern, *, at: At | None = None, step: Steps | None = None) -> SiteEdit:
    """Write the activation at ``source`` over that at ``target``, later in the same forward (loop j into loop k).

    Raises SiteError if the target comes first: to go back in time, record a run and `patch` the next.
    """
    target = _again(target)

    def attach(space: SiteSpace) -> Attachments:
        read_at, write_at = space.one(source), space.resolve(target)
        held: dict[str, Tensor] = {}
        for site in write_at:
            if len(site.loop) == len(read_at.loop) and site.loop < read_at.loop:
                raise SiteError(_backwards(read_at, site))

        def read(activation: Tensor, /, *, hook: Any) -> None:
            held["value"] = activation.clone()

        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            if "value" not in held:
                raise SiteError(_backwards(read_at, hook.site))
            if held["value"].shape != activation.shape:
                raise ValueError(f"{read_at} has shape {tuple(held['value'].shape)} and {hook.site} "
                                 f"{tuple(activation.shape)}: copy between sites of one shape.")
            return _placed(held["value"], activation, hook, at)

        return [(str(read_at), read), (target, write)]

    return SiteEdit(f"copy {source} to {target}", attach, step)


def ablate(site: SitePattern, how: Literal["zero", "mean", "resample"] = "zero", *,
           reference: Tensor | Mapping[str, Tensor] | None = None, seed: int = 0, at: At | None = None,
           step: Steps | None = None) -> SiteEdit:
    """Remove what an activation says about its input.

    *zero* writes zeros; *mean* the mean over batch and positions (over the batch, in attention patterns;
    an edit knows of no padding: a ``reference`` can leave it out);
    *resample* the activation of another example, the same one at every site, drawn from ``seed``.
    ``reference``, a recording or a tensor [batch, …], is where means and examples come from; by default the
    activation itself.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be 'zero', 'mean' or 'resample', not {how!r}.")

    site = _again(site)

    def attach(space: SiteSpace) -> Attachments:
        sites = [str(s) for s in space.resolve(site)]
        references = {} if reference is None else {s: reference if isinstance(reference, Tensor) else reference[s]
                                                   for s in sites}
        partners: dict[tuple[int, int], Tensor] = {}

        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            if how == "zero":
                return _placed(torch.zeros_like(activation), activation, hook, at)
            if axes_at(hook)[:1] != ("batch",):
                raise ValueError(f"{hook.site} has shape {list(activation.shape)}, and it is not known which of its "
                                 "axes is the batch: give watch axes=.")
            given = references.get(hook.site)
            source = activation if given is None else given.to(activation)
            if how == "mean":
                over = (0, 1) if axes_at(hook)[1:2] == ("pos",) else (0,)
                return _placed(source.mean(over, keepdim=True).expand_as(activation), activation, hook, at)
            key = len(source), len(activation)
            if key not in partners:
                partners[key] = _partners(*key, seed, others=given is None)
            return _placed(source[partners[key].to(source.device)], activation, hook, at)

        return [(site, write)]

    return SiteEdit(f"{how}-ablate {site}", attach, step)


def steer(site: SitePattern, vector: Float[Tensor, "..."], scale: float = 1.0, *, at: At | None = None,
          step: Steps | None = None) -> SiteEdit:
    """Add ``scale · vector``; the vector must broadcast to the activation, such as [d_model]."""
    site = _again(site)

    def attach(space: SiteSpace) -> Attachments:
        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            try:
                steered = activation + scale * vector.to(activation).expand_as(activation)
            except RuntimeError as error:
                raise ValueError(f"a vector of shape {tuple(vector.shape)} cannot be added at {hook.site}, whose "
                                 f"activation has shape {tuple(activation.shape)}.") from error
            return _placed(steered, activation, hook, at)

        return [(site, write)]

    return SiteEdit(f"steer {site}", attach, step)


def freeze(from_loop: int | tuple[int, ...], site: str = "**.attn.hook_pattern", *, at: At | None = None,
           step: Steps | None = None) -> SiteEdit:
    """Let every later loop use what loop ``from_loop`` computed at ``site``: by default attention patterns.

    In nested cycles ``from_loop`` is a tuple, outermost first: ``freeze((1, 0), "L.*.hook_out")`` holds what
    ``@h1.l0`` computed for every later firing, ``@h1.l1`` and all of ``@h2`` among them.
    """
    name, loops = split(site)
    if loops is not None:
        raise SiteError(f"freeze({site!r}): the loops follow from from_loop; write {name!r}.")
    wanted = from_loop if isinstance(from_loop, tuple) else (from_loop,)

    def attach(space: SiteSpace) -> Attachments:
        first, later = _from_loop(name, wanted, space)
        held: dict[str, Tensor] = {}

        def read(activation: Tensor, /, *, hook: Any) -> None:
            held[hook.name] = activation.clone()

        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            return _placed(held[hook.name], activation, hook, at)

        reading: Attachments = [([str(s) for s in first], read)]
        return reading + ([([str(s) for s in later], write)] if later else [])

    return SiteEdit(f"freeze {site} from loop {'.'.join(map(str, wanted))}", attach, step)


# --------------------------------------------------------- loops and layers, and their order


def skip_loop(loop: int, *, at: At | None = None, step: Steps | None = None) -> PlanEdit:
    """Leave the state as it was before ``loop``; the other loops keep their numbers."""
    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "skipped")
        nothing = Pass(plan[k].index, ())
        return _with(plan, k, nothing if at is None else _also(plan[k], Positions(at), nothing))

    return PlanEdit(f"skip loop {loop}", replan, step)


def repeat_loop(loop: int, times: int = 2, *, at: At | None = None, step: Steps | None = None) -> PlanEdit:
    """Run ``loop`` ``times`` times in a row; the sites of later loops move up by ``times`` − 1."""
    if times < 1:
        raise ValueError(f"a loop is repeated at least once (skip_loop leaves it out), not {times} times.")

    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "repeated")
        again = plan[k]
        if at is not None:
            again = _also(again, Positions(at, inverse=True), Pass(again.index, ()))
        return (*plan[:k + 1], *(again,) * (times - 1), *plan[k + 1:])

    return PlanEdit(f"repeat loop {loop}", replan, step)


def swap_loops(a: int, b: int, *, at: At | None = None, step: Steps | None = None) -> PlanEdit:
    """Exchange two loops. Loops share their weights, so this shows only where they differ otherwise:
    by a loop embedding, or by edits of the plan before it; elsewhere it changes nothing, bit for bit.
    """
    def replan(plan: Plan) -> Plan:
        i, j = _loop(a, plan, "swapped"), _loop(b, plan, "swapped")
        first, second = plan[i], plan[j]
        if at is not None:
            return _with(_with(plan, i, _also(first, Positions(at), second)), j, _also(second, Positions(at), first))
        return _with(_with(plan, i, second), j, first)

    return PlanEdit(f"swap loops {a} and {b}", replan, step)


def swap_layers(a: int, b: int, loop: int, *, at: At | None = None, step: Steps | None = None) -> PlanEdit:
    """Exchange two looped layers within one loop (2406.19384); sites keep the names of their layers."""
    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "reordered")
        for layer in (a, b):
            _check_layer(layer, plan[k], k)
        swapped = plan[k].map_layers(lambda layers: tuple({a: b, b: a}.get(layer, layer) for layer in layers))
        return _with(plan, k, swapped if at is None else _also(plan[k], Positions(at), swapped))

    return PlanEdit(f"swap layers {a} and {b} in loop {loop}", replan, step)


def skip_layer(layer: int, loop: int, *, at: At | None = None, step: Steps | None = None) -> Edit:
    """Leave out one looped layer in one loop (2406.19384).

    With ``at``, the chosen positions bypass it while the others still read them as they are before it.
    """
    if at is not None:
        return copy(f"blocks.{layer}.hook_resid_pre@{loop}", f"blocks.{layer}.hook_resid_post@{loop}", at=at, step=step)

    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "shortened")
        _check_layer(layer, plan[k], k)
        return _with(plan, k, plan[k].map_layers(lambda layers: tuple(other for other in layers if other != layer)))

    return PlanEdit(f"skip layer {layer} in loop {loop}", replan, step)


# ---------------------------------------------------------------------- private


def _steps(entry: Edit, n_steps: int) -> set[int]:
    """The steps of an edit, among ``n_steps``."""
    step = entry.step
    given = range(n_steps)[step] if isinstance(step, slice) else [step] if isinstance(step, int) else list(step or ())
    if not given or not all(isinstance(s, int) and -n_steps <= s < n_steps for s in given):
        raise SiteError(f"{entry.name!r} is addressed to denoising step {_written(step)}, which never comes: this run "
                        f"has {n_steps} step{'s' * (n_steps != 1)}, 0..{n_steps - 1}.")
    return {s % n_steps for s in given}


def _written(step: Steps | None) -> str:
    if isinstance(step, slice):
        return ":".join("" if part is None else str(part) for part in (step.start, step.stop))
    return str(step) if isinstance(step, int) else ", ".join(map(str, step or ())) or "none"


def _from_loop(name: str, wanted: tuple[int, ...], space: SiteSpace) -> tuple[list[Site], list[Site]]:
    """The firings of ``name`` at loop ``wanted``, and all later firings of the same names."""
    looped = {site.name: len(site.loop) for site in space.resolve(name) if site.loop}
    if not looped:
        raise SiteError(f"{name!r} runs once per forward and has no loops to freeze.")
    fitting = [n for n, cycles in looped.items() if cycles == len(wanted)]
    if not fitting:
        other, cycles = next(iter(looped.items()))
        raise SiteError(f"{other} is looped over {cycles} cycle{'s' * (cycles > 1)}, and from_loop={wanted} names "
                        f"{len(wanted)}: give one number for each, outermost first"
                        + (f", ({', '.join(letter for letter, _ in space.axes(other))})." if cycles > 1 else "."))
    first: list[Site] = []
    later: list[Site] = []
    for n in fitting:
        axes = space.axes(n)
        loop = tuple(i + count if i < 0 else i for i, (_, count) in zip(wanted, axes, strict=True))
        from_an_unknown_end = min(wanted) < 0 and space.is_open_ended(n)
        if from_an_unknown_end or not all(0 <= i < count for i, (_, count) in zip(loop, axes, strict=True)):
            space.resolve(f"{n}@{'.'.join(f'{letter}{i}' for i, (letter, _) in zip(wanted, axes, strict=True))}")
        firings = space.firings(n)  # in the order in which they fire
        if reading := [site for site in firings if site.loop == loop]:
            first += reading
            later += [site for site in firings if site.loop > loop]
    if not first:
        raise SiteError(f"{fitting[0]} cannot be frozen from loop {'.'.join(map(str, wanted))}: an edit of this run "
                        "skips it there.")
    return first, later


def _again(pattern: SitePattern) -> SitePattern:
    """A pattern that can be resolved more than once."""
    if pattern is None or isinstance(pattern, (str, re.Pattern)) or callable(pattern):
        return pattern
    return list(pattern)


def _placed(new: Tensor, old: Tensor, hook: Any, at: At | None) -> Tensor:
    """``new`` at the chosen positions, ``old`` at the others."""
    return new if at is None else torch.where(Positions(at).mask(old, axes_at(hook)), new, old)


def _partners(n_source: int, n: int, seed: int, *, others: bool) -> Tensor:
    """[n] rows to resample from; with ``others``, each example gets one that is not itself."""
    generator = torch.Generator().manual_seed(seed)
    if not others:
        return torch.randint(n_source, (n,), generator=generator)
    if n < 2:
        raise ValueError("resampling replaces an example by another, and the batch holds only one: give a larger "
                         "batch, or a reference to draw from.")
    order = torch.randperm(n, generator=generator)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return partners


def _backwards(source: Site, target: Site | str) -> str:
    return (f"{source} has not been computed when {target} is reached: an activation can only be copied forward in "
            "time. Record a run, then patch() the next one with it.")


def _with(plan: Plan, k: int, step: Pass) -> Plan:
    return (*plan[:k], step, *plan[k + 1:])


def _also(step: Pass, where: Positions, other: Pass) -> Pass:
    return replace(step, instead=(*step.instead, (where, other)))


def _loop(loop: int, plan: Plan, done: str) -> int:
    k = loop + len(plan) if loop < 0 else loop
    if not 0 <= k < len(plan):
        raise SiteError(f"loop {loop} cannot be {done}: this run has {len(plan)} loops, 0..{len(plan) - 1}.")
    return k


def _check_layer(layer: int, step: Pass, k: int) -> None:
    if layer not in step.layers:
        raise SiteError(f"layer {layer} does not run in loop {k}; its layers are {', '.join(map(str, step.layers))}.")
