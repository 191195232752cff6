"""The loop away from its own path: along its update, and from perturbed starts.

    search = line_search(model, noised, targets=tokens, n_loops=8)      # nll [loop, alpha, example]; alpha 1 is the run
    basins(model, noised, n_loops=16, sizes=(0.01, 0.1, 1.0))           # agreement, settling [size, start, example]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Context, Inputs, Levels, LoopedModel
from probes.answers import ROWS, Judge, asked, of_versions
from probes.measurement import check_run, mean_over_positions, measurement

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Step sizes that `line_search` tries: 0 stays, 1 is the loop's own step."""

SETTLED = 0.01
"""Distance to the last state, relative to its size, below which a state has settled."""


@torch.no_grad()
def line_search(model: LoopedModel, inputs: Inputs, *, targets: Int[Tensor, "batch pos"] | None = None,
                alphas: Sequence[float] = ALPHAS, n_loops: int | None = None, t: Levels = None,
                scored: Bool[Tensor, "batch pos"] | None = None, rows: int = ROWS) -> xr.Dataset:
    """What is answered when a loop's step is longer or shorter, and then looping stops; over (loop, alpha, example).

    ``nll`` [nat], mean over scored positions, of the answer read by the coda from X_k + α (X_(k+1) − X_k): the right
    direction with the wrong size has its least NLL away from α = 1 (2609.16665). ``best`` (loop, example) is the α
    with the least NLL among those tried, ``gain`` (loop, example) what it saves against α = 1. The best of several is
    never worse than one of them, by chance alone: ``best_of_all`` (loop) and ``gain_of_all`` (loop, example) take the
    one α that is best on the other examples, which chance does not help.

    Raises ValueError for an ``alphas`` without 1, targets and masks that do not fit, fewer than two examples, and
    states that are not finite.
    """
    tried = sorted({float(a) for a in alphas})
    if 1.0 not in tried or len(tried) < 2:
        raise ValueError(f"alphas must hold 1, the loop's own step, and another; not {tuple(alphas)}.")
    with model.exclusive():
        run = model.run(inputs, n_loops, t=t)
        check_run(run)
        states, logits, context = run
        if len(logits) < 2:
            raise ValueError("the best step of an example is judged by the others, and there is one: give more.")
        judge = Judge(logits, *asked(model, inputs, logits, targets, scored))
        loops, found = context.topology.loop_depths(), []
        tail = context.topology.depth - context.topology.n_tail
        for depths in loops:
            before, after = states[depths[0]], states[depths[-1] + 1]
            steps = torch.stack([torch.lerp(before.float(), after.float(), a).to(after) for a in tried])
            found.append(of_versions(model, tail, steps, context, judge, rows)[0])
    nll = torch.stack(found).double()                                        # [loop, alpha, example]
    own = tried.index(1.0)
    best = nll.argmin(1)
    others = (nll.nansum(-1, keepdim=True) - nll.nan_to_num()).argmin(1)          # the best of all but this example
    taken = torch.gather(nll, 1, others[:, None])[:, 0]
    alpha = torch.tensor(tried, dtype=torch.double)
    undefined = nll[:, 0].isnan()
    definition = "coda lens of X_k + α (X_(k+1) − X_k), mean over scored positions"
    named = {"nll": (nll, "NLL after a step of another size", "nat", ("loop", "alpha", "example")),
             "best": (alpha[best].masked_fill(undefined, torch.nan), "best step size", "1", ("loop", "example")),
             "gain": (nll[:, own] - nll.amin(1), "NLL saved by the best step size", "nat", ("loop", "example")),
             "best_of_all": (alpha[nll.nansum(-1).argmin(1)], "best step size of all examples", "1", ("loop",)),
             "gain_of_all": (nll[:, own] - taken, "NLL saved by the step size that is best on the other examples",
                             "nat", ("loop", "example"))}
    return xr.Dataset({name: measurement(value, dims, long_name=long_name, units=units, definition=definition,
                                         source="arXiv 2609.16665")
                       for name, (value, long_name, units, dims) in named.items()},
                      {"loop": np.arange(len(loops)), "alpha": tried}, {"n_loops": context.topology.n_loops})


@torch.no_grad()
def basins(model: LoopedModel, inputs: Inputs, *, sizes: Sequence[float] = (0.01, 0.1, 1.0), n_starts: int = 4,
           n_loops: int | None = None, t: Levels = None, scored: Bool[Tensor, "batch pos"] | None = None,
           seed: int = 0, rows: int = ROWS) -> xr.Dataset:
    """Where the loop goes from perturbed starts; over (size, start, example) and (…, loop).

    The state that enters loop 0 is X_0 + size · ‖X_0‖ · u, u a random direction of each position. ``agreement`` is the
    share of scored positions whose last answer is that of the run itself: 1 where the start does not matter, and in a
    model that always answers the same. ``distance`` (size, start, loop, example) is ‖X'_k − X_k‖ / ‖X_k‖ after each
    loop, mean over positions: it falls where the loop forgets its start, and where the norm grows. ``settling`` is the
    number of loops after which an example's state is, in the mean over positions, within 1% of its own last state and
    stays there, n_loops where it is only at the end; ``own_settling`` (example) that of the run as it is. A residual
    stream that only adds up keeps the size of the perturbation and settles never: that is the null. Definition of
    settling times: 2609.04963.

    Raises ValueError for sizes that are not above 0, no start, fewer than two loops, and states that are not finite.
    """
    if not sizes or min(sizes) <= 0 or n_starts < 1:
        raise ValueError(f"sizes must be above 0 and n_starts at least 1, not {tuple(sizes)} and {n_starts}.")
    with model.exclusive():
        run = model.run(inputs, n_loops, t=t)
        check_run(run)
        states, logits, context = run
        loops = context.topology.loop_depths()
        if len(loops) < 2:
            raise ValueError(f"settling takes at least two loops; {model.name} runs {len(loops)} here.")
        where = (model.scored(inputs) if scored is None else scored).to(logits.device)
        exits = [depths[-1] + 1 for depths in loops]
        path = torch.stack([states[depth] for depth in exits])                     # [loop, example, pos, d_model]
        entry, answer = states[loops[0][0]], logits.argmax(-1)
        generator = torch.Generator().manual_seed(seed)
        agreement, distance, settling = [], [], []
        for size in sizes:
            for _ in range(n_starts):
                noise = torch.randn(entry.shape, generator=generator).to(entry.device)
                noise = noise / noise.norm(dim=-1, keepdim=True) * entry.float().norm(dim=-1, keepdim=True)
                state = (entry.float() + size * noise).to(entry)
                last, moved = _followed(model, context, state, loops, rows)
                agreement.append(mean_over_positions((last.argmax(-1) == answer).float(), where))
                distance.append(_relative(moved, path).mean(-1))
                settling.append(_settling(moved))
    shape = (len(sizes), n_starts)
    place = ("size", "start", "example")
    named = {"agreement": (torch.stack(agreement).unflatten(0, shape), "share of answers that are the run's own", "1",
                           place),
             "distance": (torch.stack(distance).unflatten(0, shape), "distance to the run itself", "1",
                          ("size", "start", "loop", "example")),
             "settling": (torch.stack(settling).unflatten(0, shape), "loops until the state has settled", "loop",
                          place),
             "own_settling": (_settling(path), "loops until the run itself has settled", "loop", ("example",))}
    definition = f"from X_0 + size · ‖X_0‖ · u; settled: within {SETTLED:.0%} of its own last state"
    return xr.Dataset({name: measurement(value, dims, long_name=long_name, units=units, definition=definition,
                                         source="arXiv 2609.04963")
                       for name, (value, long_name, units, dims) in named.items()},
                      {"size": list(sizes), "start": np.arange(n_starts), "loop": np.arange(len(loops))},
                      {"n_loops": context.topology.n_loops, "seed": seed})


# -------------------------------------------------------------------------------------- private

def _followed(model: LoopedModel, context: Context, state: Tensor, loops: Sequence[Sequence[int]],
              rows: int) -> tuple[Tensor, Float[Tensor, "loop example pos d_model"]]:
    """The last answer and the state after each loop, from a state that enters loop 0."""
    answers, paths = [], []
    for some in torch.arange(len(state), device=state.device).split(rows):
        own, at, path = context.rows(some), state[some], []
        for depths in loops:
            at = model.walk(at, own, depths[0], depths[-1] + 1)
            path.append(at)
        answers.append(model.coda(at, own))
        paths.append(torch.stack(path))
    return torch.cat(answers), torch.cat(paths, 1)


def _relative(one: Tensor, other: Tensor) -> Tensor:
    size = other.float().norm(dim=-1)
    return (one.float() - other.float()).norm(dim=-1) / size.clamp_min(1e-30)


def _settling(path: Float[Tensor, "loop example pos d_model"]) -> Float[Tensor, "example"]:
    """The number of loops after which the state stays near its last, 1 where the first loop already arrives."""
    away = _relative(path, path[-1:].expand_as(path)).mean(-1) > SETTLED                 # [loop, example]
    number = torch.arange(1, len(path) + 1, device=path.device)[:, None]
    return (number * away).amax(0).float() + 1
