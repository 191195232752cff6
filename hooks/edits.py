"""Interventions as values: patch, copy, ablate, steer, freeze; skip, repeat and swap.

An edit goes wherever a hook goes, alone or with others, and is undone when the block ends:

    logits = model.run_with_hooks(tokens, 8, fwd_hooks=[steer("blocks.2.hook_resid_post@3", v), skip_loop(5)])
    with edit(model, [patch("blocks.2.hook_resid_post@3", rec, at=slice(0, 12)), freeze(4)], n_loops=8):
        logits, after = model.run_with_cache(tokens, 8)

**Site edits** write at sites, in the order in which they are listed; they work on anything that has
sites, `hooks.watch` included. **Plan edits** change which loops and layers run (see `hooks.plan`), each on the
plan that those before it left; sites then name the passes of the resulting run. ``at`` limits an edit to
positions (a slice, indices, or booleans [pos] or [batch, pos]); in attention patterns it means the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


@dataclass(frozen=True)
class SiteEdit:
    """Writes at sites. ``attach`` makes its hooks for one run, checking before it what can be checked."""

    name: str
    attach: Callable[[SiteSpace], Attachments]


@dataclass(frozen=True)
class PlanEdit:
    """Changes which loops and layers run, in which order."""

    name: str
    replan: Replan


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
        if isinstance(entry, SiteEdit):
            pairs.extend(entry.attach(space))
        elif not isinstance(entry, PlanEdit):
            pairs.append(entry)
    return pairs


# --------------------------------------------------------------------- at sites


def patch(site: SitePattern, source: Tensor | Mapping[str, Tensor], *, source_site: str | None = None,
          at: At | None = None) -> SiteEdit:
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

    return SiteEdit(f"patch {site}", attach)


def copy(source: str, target: SitePattern, *, at: At | None = None) -> SiteEdit:
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

    return SiteEdit(f"copy {source} to {target}", attach)


def ablate(site: SitePattern, how: Literal["zero", "mean", "resample"] = "zero", *,
           reference: Tensor | Mapping[str, Tensor] | None = None, seed: int = 0, at: At | None = None) -> SiteEdit:
    """Remove what an activation says about its input.

    *zero* writes zeros; *mean* the mean over batch and positions (over the batch, in attention patterns);
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

    return SiteEdit(f"{how}-ablate {site}", attach)


def steer(site: SitePattern, vector: Float[Tensor, "..."], scale: float = 1.0, *, at: At | None = None) -> SiteEdit:
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

    return SiteEdit(f"steer {site}", attach)


def freeze(from_loop: int, site: str = "**.attn.hook_pattern", *, at: At | None = None) -> SiteEdit:
    """Let every later loop use what loop ``from_loop`` computed at ``site``: by default attention patterns."""
    name, loops = split(site)
    if loops is not None:
        raise SiteError(f"freeze({site!r}): the loops follow from from_loop; write {name!r}.")

    def attach(space: SiteSpace) -> Attachments:
        first = space.resolve(f"{name}@{from_loop}")
        numbers = {s.name: s.loop[0] for s in first}  # from_loop may be negative
        later = [s for s in space.resolve(f"{name}@*") if s.name in numbers and s.loop[0] > numbers[s.name]]
        held: dict[str, Tensor] = {}

        def read(activation: Tensor, /, *, hook: Any) -> None:
            held[hook.name] = activation.clone()

        def write(activation: Tensor, /, *, hook: Any) -> Tensor:
            return _placed(held[hook.name], activation, hook, at)

        reading: Attachments = [([str(s) for s in first], read)]
        return reading + ([([str(s) for s in later], write)] if later else [])

    return SiteEdit(f"freeze {site} from loop {from_loop}", attach)


# --------------------------------------------------------- loops and layers, and their order


def skip_loop(loop: int, *, at: At | None = None) -> PlanEdit:
    """Leave the state as it was before ``loop``; the other loops keep their numbers."""
    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "skipped")
        nothing = Pass(plan[k].index, ())
        return _with(plan, k, nothing if at is None else _also(plan[k], Positions(at), nothing))

    return PlanEdit(f"skip loop {loop}", replan)


def repeat_loop(loop: int, times: int = 2, *, at: At | None = None) -> PlanEdit:
    """Run ``loop`` ``times`` times in a row; the sites of later loops move up by ``times`` − 1."""
    if times < 1:
        raise ValueError(f"a loop is repeated at least once (skip_loop leaves it out), not {times} times.")

    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "repeated")
        again = plan[k]
        if at is not None:
            again = _also(again, Positions(at, inverse=True), Pass(again.index, ()))
        return (*plan[:k + 1], *(again,) * (times - 1), *plan[k + 1:])

    return PlanEdit(f"repeat loop {loop}", replan)


def swap_loops(a: int, b: int, *, at: At | None = None) -> PlanEdit:
    """Exchange two loops. Loops share their weights, so this shows only where they differ otherwise:
    by a loop embedding, or by edits of the plan before it; elsewhere it changes nothing, bit for bit.
    """
    def replan(plan: Plan) -> Plan:
        i, j = _loop(a, plan, "swapped"), _loop(b, plan, "swapped")
        first, second = plan[i], plan[j]
        if at is not None:
            return _with(_with(plan, i, _also(first, Positions(at), second)), j, _also(second, Positions(at), first))
        return _with(_with(plan, i, second), j, first)

    return PlanEdit(f"swap loops {a} and {b}", replan)


def swap_layers(a: int, b: int, loop: int, *, at: At | None = None) -> PlanEdit:
    """Exchange two looped layers within one loop (2406.19384); sites keep the names of their layers."""
    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "reordered")
        for layer in (a, b):
            _check_layer(layer, plan[k], k)
        swapped = plan[k].map_layers(lambda layers: tuple({a: b, b: a}.get(layer, layer) for layer in layers))
        return _with(plan, k, swapped if at is None else _also(plan[k], Positions(at), swapped))

    return PlanEdit(f"swap layers {a} and {b} in loop {loop}", replan)


def skip_layer(layer: int, loop: int, *, at: At | None = None) -> Edit:
    """Leave out one looped layer in one loop (2406.19384).

    With ``at``, the chosen positions bypass it while the others still read them as they are before it.
    """
    if at is not None:
        return copy(f"blocks.{layer}.hook_resid_pre@{loop}", f"blocks.{layer}.hook_resid_post@{loop}", at=at)

    def replan(plan: Plan) -> Plan:
        k = _loop(loop, plan, "shortened")
        _check_layer(layer, plan[k], k)
        return _with(plan, k, plan[k].map_layers(lambda layers: tuple(other for other in layers if other != layer)))

    return PlanEdit(f"skip layer {layer} in loop {loop}", replan)


# ---------------------------------------------------------------------- private


def _again(pattern: SitePattern) -> SitePattern:
    """A pattern that can be resolved more than once."""
    return pattern if pattern is None or isinstance(pattern, str) or callable(pattern) else list(pattern)


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
