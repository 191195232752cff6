"""What the claims study measures: one triplet, claims (a) to (g), example by example.

Each function answers for one claim of LoopMDM (2605.26106) with a labelled dataset; values that
belong to single held-out examples keep an ``example`` axis, so that `judge` can put
intervals around them. All models of a task see the same examples, noise levels and masks.

    data = measure(triplet("automaton"), SampleSizes())
    data["loops"].exact.sel(kind="loop", n_loops=8).mean()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks import HookedLoopMDM
from hooks.contract import LoopedModel
from hooks.model.diffusion import SamplerConfig, antithetic_t, corrupt, sample
from probes.attention import attention_summary
from probes.loops import loop_states
from probes.measurement import measurement
from studies.tasks import Batch, Task
from studies.training.evaluation import doubled_loops
from studies.zoo import Entry, read_metrics

PAPER = "arXiv 2605.26106"
THRESHOLDS = (0.003, *(i / 100 for i in range(1, 31)), 0.4, 0.5)
"""Relative changes of the state at which adaptive looping stops."""
NOISE_LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 11))
ATTENTION_T = 0.5
BUDGET_POINTS = 41


@dataclass(frozen=True)
class SampleSizes:
    """How much is measured."""

    examples: int = 256         # held-out examples of (b), (c), (f)
    few: int = 96               # of the costlier (d), (e), (g)
    batch: int = 64             # examples per forward
    steps: tuple[int, ...] = (1, 2, 4, 8)  # denoising steps of (g), beside those of equal compute
    seed: int = 0               # of examples, noise levels, masks and samples


def measure(models: Mapping[str, Entry], sizes: SampleSizes,
            progress: Callable[[str], None] = lambda _: None) -> dict[str, xr.Dataset]:
    """All claims for one triplet (or as much of it as there is; "loop" must be)."""
    found = {}
    for name, function in (("training", training_curves), ("loops", quality_over_loops), ("noise", by_noise_level),
                           ("attention", mask_attention), ("adaptive", adaptive_looping), ("sampling", loops_or_steps)):
        progress(name)
        found[name] = function(models, sizes)
    return found


# --------------------------------------------------------------------------------- (a)


def training_curves(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """NELBO over training FLOPs, and the FLOPs a twin needs ÷ those the LoopMDM needs to match its last NELBO.

    Where the LoopMDM never reaches it, ``flops_ratio`` (kind) is that of the whole trainings, an upper bound, and
    ``flops_ratio_side`` (kind) is −1; where it is there at its first evaluation, a lower bound, and 1; otherwise 0.
    Curves come from the cards' metrics; between two evaluations they are read as straight lines.
    """
    share = np.linspace(0, 1, BUDGET_POINTS)[1:]
    tables = {kind: read_metrics(entry.path) for kind, entry in models.items()}
    budget = max(float(table.flops.iloc[-1]) for table in tables.values())
    curves = [np.interp(share * budget, table.flops, table.nelbo, left=np.nan, right=np.nan)
              for table in tables.values()]
    ratios = [_flops_ratio(tables["loop"], table) for table in tables.values()]
    kinds: dict[Any, Any] = {"kind": list(models)}
    return xr.Dataset({
        "nelbo": measurement(np.array(curves), ("kind", "flops"), long_name="held-out NELBO", units="nat",
                             definition="negative ELBO per free token, on the averaged weights", source=PAPER,
                             coords={**kinds, "flops": share * budget}),
        "flops_ratio": measurement([ratio for ratio, _ in ratios], ("kind",), units="1", source=PAPER, coords=kinds,
                                   long_name="training FLOPs ÷ those of the LoopMDM",
                                   definition="FLOPs of a model's whole training ÷ FLOPs after which the LoopMDM first "
                                   "has that model's last NELBO; a bound where flops_ratio_side is not 0"),
        "flops_ratio_side": measurement([side for _, side in ratios], ("kind",), units="1", source=PAPER, coords=kinds,
                                        long_name="side of flops_ratio on which the ratio is",
                                        definition="−1: below, the LoopMDM never has that NELBO; 1: above, it has it "
                                        "at its first evaluation; 0: the ratio is known")})


def _flops_ratio(loop: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float]:
    """(FLOPs of ``other`` ÷ those after which ``loop`` has its last NELBO, side on which the ratio is)."""
    x, y = loop.flops.to_numpy(), loop.nelbo.to_numpy()
    needed, total = float(other.flops.iloc[-1]), float(x[-1])
    reached = first_crossing(x, y, float(other.nelbo.iloc[-1]))
    if np.isnan(reached):
        return needed / total, -1
    if reached <= x[0]:
        return needed / float(x[x > 0].min()), 1
    return needed / reached, 0


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """The first x at which the polyline (x, y) is at or below ``level``; NaN if it never is."""
    below = np.flatnonzero(y <= level)
    if not len(below):
        return float("nan")
    i = int(below[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


# --------------------------------------------------------------------------- (b) and (c)


@torch.no_grad()
def quality_over_loops(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """NELBO, share of free cells right and exact accuracy per example, over S = 1 … 4·S_max; twins at S = 1 only.

    Accuracy is of one forward with every free position masked.
    """
    task, s_max = models["loop"].task, _s_max(models)
    batch = task.sample(sizes.examples, seed=sizes.seed, split="test")
    masked = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    generator = torch.Generator().manual_seed(sizes.seed)
    t = antithetic_t(sizes.examples, generator=generator)
    noised = corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)
    loops = loop_counts(s_max)
    values = np.full((3, len(models), len(loops), sizes.examples), np.nan)
    for index, (kind, entry) in enumerate(models.items()):
        wanted = loops if kind == "loop" else [1]
        for part in _parts(sizes.examples, sizes.batch):
            piece = Batch(batch.tokens[part], batch.free[part])
            for row, logits, _ in answers_over_loops(entry.model, masked[part], torch.ones(len(piece.tokens)), wanted):
                score = task.score(logits.argmax(-1), piece)
                for at, name in enumerate(("cells", "exact")):
                    values[at, index, loops.index(row), part] = score[name].numpy()
            for row, logits, _ in answers_over_loops(entry.model, noised[part], t[part], wanted):
                nll = _nll(logits, piece.tokens) * (noised[part] == task.mask_token_id)
                values[2, index, loops.index(row), part] = (nll.sum(1) / t[part] / piece.free.sum(1)).numpy()
    coords: dict[Any, Any] = {"kind": list(models), "n_loops": loops}
    dims = ("kind", "n_loops", "example")
    return xr.Dataset({
        "cells": measurement(values[0], dims, long_name="free cells right", units="probability", coords=coords,
                             definition="share of free positions right, all masked, one forward", source=PAPER),
        "exact": measurement(values[1], dims, long_name="examples right", units="probability", coords=coords,
                             definition="1 if every free position is right, all masked, one forward", source=PAPER),
        "nelbo": measurement(values[2], dims, long_name="NELBO", units="nat", coords=coords,
                             definition="(1/t) Σ −log p over masked positions, per free token", source=PAPER)})


def loop_counts(s_max: int) -> list[int]:
    """1 … 4·S_max: every loop up to S_max would be costly to draw, so powers of two, S_max and its multiples."""
    return sorted({*doubled_loops(s_max), round(1.5 * s_max), 2 * s_max, 3 * s_max, 4 * s_max})


# --------------------------------------------------------------------------------- (d)


@torch.no_grad()
def by_noise_level(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """Loop gain NLL(t, S = 1) − NLL(t, S_max) per example, nats per masked token, by noise level."""
    entry, s_max = models["loop"], _s_max(models)
    task = entry.task
    batch = task.sample(sizes.few, seed=sizes.seed, split="test")
    nll = np.zeros((2, len(NOISE_LEVELS), sizes.few))
    for at, level in enumerate(NOISE_LEVELS):
        noised = corrupt(batch.tokens, level, task.mask_token_id, free=batch.free,
                         generator=torch.Generator().manual_seed(sizes.seed))   # masks grow with t: nested
        for part in _parts(sizes.few, sizes.batch):
            masked = noised[part] == task.mask_token_id
            t = torch.full((len(masked),), level)
            answers = answers_over_loops(entry.model, noised[part], t, sorted({1, s_max}))
            for which, (_, logits, _) in enumerate(answers):
                value = (_nll(logits, batch.tokens[part]) * masked).sum(1) / masked.sum(1)   # NaN: nothing masked
                nll[which, at, part] = value.numpy()
    coords: dict[Any, Any] = {"t": list(NOISE_LEVELS)}
    return xr.Dataset({
        "gain": measurement(nll[0] - nll[1], ("t", "example"), long_name="loop gain", units="nat", coords=coords,
                            definition="NLL(t, S = 1) − NLL(t, S_max), per masked token", source=PAPER),
        "nll": measurement(nll[1], ("t", "example"), long_name="NLL at S_max", units="nat", coords=coords,
                           definition="mean −log p over masked positions", source=PAPER)})


# --------------------------------------------------------------------------------- (e)


def mask_attention(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """Attention from masked to masked positions per loop, mean over looped layers and heads, to 2·S_max loops."""
    entry, s_max = models["loop"], _s_max(models)
    task = entry.task
    batch = task.sample(sizes.few, seed=sizes.seed, split="test")
    noised = corrupt(batch.tokens, ATTENTION_T, task.mask_token_id, free=batch.free,
                     generator=torch.Generator().manual_seed(sizes.seed))
    parts = []
    for part in _parts(sizes.few, sizes.batch):
        summary = attention_summary(entry.model, noised[part], n_loops=2 * s_max, t=ATTENTION_T, per_example=True)
        chosen = summary[["flow", "flow_over_chance"]].sel(query_role="masked", key_role="masked", drop=True)
        looped_only = chosen.isel(depth=np.flatnonzero(summary.loop.values >= 0))
        parts.append(looped_only.groupby("loop").mean("depth").mean("head", keep_attrs=True))
    joined = xr.concat(parts, "batch").rename(batch="example").drop_vars("example", errors="ignore")
    return xr.Dataset({name: measurement(joined[name].transpose("loop", "example").values, ("loop", "example"),
                                         long_name=f"mask-to-mask {what}", units=units, source=PAPER,
                                         coords={"loop": joined.loop.values + 1},
                                         definition=f"mean over looped layers and heads, at t = {ATTENTION_T}")
                       for name, what, units in (("flow", "attention", "probability"),
                                                 ("flow_over_chance", "attention over chance", "1"))})


# --------------------------------------------------------------------------------- (f)


@torch.no_grad()
def adaptive_looping(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """Loops used and quality per example when each stops at a relative change below τ, at most S_max loops.

    One run of S_max loops answers for every τ, since examples do not see each other. τ = 0 never stops.
    """
    entry, s_max = models["loop"], _s_max(models)
    task = entry.task
    batch = task.sample(sizes.examples, seed=sizes.seed, split="test")
    masked = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    levels = (0.0, *THRESHOLDS)
    used = np.zeros((len(levels), sizes.examples))
    cells, exact = np.zeros_like(used), np.zeros_like(used)
    for part in _parts(sizes.examples, sizes.batch):
        piece = Batch(batch.tokens[part], batch.free[part])
        run = list(answers_over_loops(entry.model, masked[part], torch.ones(len(piece.tokens)), range(1, s_max + 1)))
        change = torch.stack([delta for _, _, delta in run])                     # [loop, example]
        predicted = torch.stack([logits.argmax(-1) for _, logits, _ in run])     # [loop, example, pos]
        for at, level in enumerate(levels):
            stops = change < level
            stop = torch.where(stops.any(0), stops.int().argmax(0), s_max - 1)
            score = task.score(predicted[stop, torch.arange(len(stop))], piece)
            used[at, part] = (stop + 1).numpy()
            cells[at, part], exact[at, part] = score["cells"].numpy(), score["exact"].numpy()
    coords: dict[Any, Any] = {"threshold": list(levels)}
    dims = ("threshold", "example")
    definition = "stop when ‖H(k) − H(k−1)‖ / ‖H(k−1)‖ < τ, at most S_max loops; every free position masked"
    return xr.Dataset({name: measurement(value, dims, long_name=label, units=units, definition=definition,
                                         source=PAPER, coords=coords)
                       for name, value, label, units in (("loops_used", used, "loops used", "1"),
                                                         ("cells", cells, "free cells right", "probability"),
                                                         ("exact", exact, "examples right", "probability"))})


# --------------------------------------------------------------------------------- (g)


def loops_or_steps(models: Mapping[str, Entry], sizes: SampleSizes) -> xr.Dataset:
    """Accuracy of confidence-ordered sampling: loops against denoising steps at equal layer calls, and over steps.

    ``equal_*`` (plan, example): pairs of S and steps whose layer calls are nearest to 4 steps of S_max loops.
    ``steps_*`` (n_loops, n_steps, example): S = 1 and S_max at each number of steps.
    """
    entry, s_max = models["loop"], _s_max(models)
    batch = entry.task.sample(sizes.few, seed=sizes.seed, split="test")
    plans = equal_plans(entry.model, s_max)
    wanted = {*plans, *((s, n) for s in (1, s_max) for n in sizes.steps)}
    scores = {(s, n): _sampled(entry.model, entry.task, batch, n_loops=s, n_steps=n, size=sizes.batch)
              for s, n in sorted(wanted)}
    found = {}
    for name, label in (("cells", "free cells right"), ("exact", "examples right")):
        found[f"equal_{name}"] = measurement(
            np.stack([scores[plan][name] for plan in plans]), ("plan", "example"), long_name=label, units="probability",
            definition="confidence order, temperature 0; layer calls nearest to 4 steps of S_max loops", source=PAPER,
            coords={"plan": np.arange(len(plans)), "n_loops": ("plan", [s for s, _ in plans]),
                    "n_steps_of_plan": ("plan", [n for _, n in plans])})
        found[f"steps_{name}"] = measurement(
            np.stack([np.stack([scores[s, n][name] for n in sizes.steps]) for s in (1, s_max)]),
            ("loops", "n_steps", "example"), long_name=label, units="probability", source=PAPER,
            definition="confidence order, temperature 0", coords={"loops": [1, s_max], "n_steps": list(sizes.steps)})
    return xr.Dataset(found)


def equal_plans(model: HookedLoopMDM, s_max: int) -> list[tuple[int, int]]:
    """(loops, steps) whose layer calls are nearest to those of 4 steps with S_max loops."""
    calls = 4 * model.config.topology(s_max).depth
    loops = sorted({1, max(1, s_max // 4), max(1, s_max // 2), s_max, 2 * s_max})
    return [(s, max(1, round(calls / model.config.topology(s).depth))) for s in loops]


def _sampled(model: HookedLoopMDM, task: Task, batch: Batch, *, n_loops: int, n_steps: int,
             size: int) -> dict[str, np.ndarray]:
    found = []
    for part in _parts(len(batch.tokens), size):
        prompt = batch.tokens[part].masked_fill(batch.free[part], task.mask_token_id)
        config = SamplerConfig(n_steps=n_steps, order="confidence", n_loops=n_loops, temperature=0)
        trace = sample(model, prompt, config)
        found.append(task.score(trace[-1].after, Batch(batch.tokens[part], batch.free[part])))
    return {name: np.concatenate([score[name].numpy() for score in found]) for name in ("cells", "exact")}


# --------------------------------------------------------------------------- shared parts


def answers_over_loops(model: LoopedModel, noised: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"],
                       loops: Sequence[int],
                       ) -> Iterator[tuple[int, Float[Tensor, "batch pos vocab"], Float[Tensor, "batch"]]]:
    """(S, logits after S loops, relative change of the state by loop S) for each S in ``loops``, in one run.

    Gradients are kept unless the caller does without them.
    """
    states = loop_states(model, noised, max(loops), t=t)
    before, _ = next(states)
    for n_loops, (state, context) in enumerate(states, start=1):
        if n_loops in loops:
            change = (state - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1).clamp_min(1e-12)
            yield n_loops, model.coda(state, context), change
        before = state


def _nll(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


def _s_max(models: Mapping[str, Entry]) -> int:
    return models["loop"].model.config.max_loops


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]
