"""What is measured of the noise level: how well it can be read at each loop, and what moving along it does.

    read, moved = measure(model, drawn, n_loops=4, seed=0)
    read.error, moved.work.sel(push="along", sign=1)

**Read.** From the state at one masked position a ridge regression tells the share of the sequence that is masked. It is
fitted on half of the examples and judged on the other half, with all positions of an example on one side. Beside it
stand the same regression on shuffled shares, the one from the answer's confidence alone, and the one from both: an
answer is the surer, the less is masked, and what confidence tells is no knowledge of the noise level.

**Moved.** b is the slope of the state on the share (least squares, same half). Δ · b is added to the state that enters
a loop at all masked positions, and the run goes on: entropy and NLL of the answer, and the work of that loop, the
divergence that leaving it out makes. Random directions of the same length show what any push does.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeCV
from torch import Tensor

from hooks import LoopedModel
from probes.cycles import own_loops
from probes.exchange import Clocks, Trajectory
from probes.measurement import mean_by_example, mean_over_positions, measurement
from studies.questions.stage_test.subjects import Examples

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Noise levels of the examples, as many of each."""
POSITIONS = 6
"""Masked positions of an example that are read, at most."""
ALPHAS = tuple(10.0 ** k for k in range(-3, 5))
"""Strengths of the ridge that are tried, by generalised cross-validation on the fitting half."""
STEP = 0.2
"""Δ: the share by which the state is moved, up and down."""
RANDOM = 8
"""Random directions beside it."""

READERS = {
    "state": "from the state", "shuffled": "from the state, fitted to the shares of other examples",
    "confidence": "from the entropy and the largest probability of the answer after these loops, and their squares",
    "both": "from state and confidence", "mean": "the mean share of the fitting half"}
"""What the share is told from."""
MEASURES = {"entropy": "entropy of the answer", "nll": "NLL of the targets", "work": "work of the loop that is entered"}
SOURCE = "ours; after 2607.01774"


@torch.no_grad()
def measure(model: LoopedModel, drawn: Examples, *, n_loops: int, seed: int, loop: int = 1,
             ) -> tuple[xr.Dataset, xr.Dataset]:
    """(``error`` [reader, loop, example], the squared error of the share, mean over an example's positions; entropy,
    nll and work [push, sign, example], of the states that enter ``loop``); both over the examples that judge.

    The pushes are "along" b and "random 0" …; sign −1, 0, 1. Loop 0 is what enters the loops, the last is what leaves
    them. Raises ValueError for fewer than eight examples.
    """
    n = len(drawn.inputs)
    if n < 8:
        raise ValueError(f"half of the examples fit and half judge: give at least 8, not {n}.")
    run = Trajectory.of(model, drawn.inputs, own_loops(model.topology(n_loops)), t=drawn.t)
    fit = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) < n // 2
    share = drawn.scored.float().mean(1)
    example, pos = _chosen(drawn, seed)
    return (_read(run, drawn, share, fit, example, pos, seed),
            _moved(run, drawn, share, fit, example, pos, loop, seed))


def _chosen(drawn: Examples, seed: int) -> tuple[Int[Tensor, "point"], Int[Tensor, "point"]]:
    """Up to `POSITIONS` masked positions of each example, at random."""
    rank = torch.rand(drawn.scored.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~drawn.scored, 2.0)
    rows = rank.argsort(1)[:, :POSITIONS]
    there = drawn.scored.gather(1, rows)
    example, which = torch.nonzero(there, as_tuple=True)
    return example, rows[example, which]


def _read(run: Trajectory, drawn: Examples, share: Tensor, fit: Tensor, example: Tensor, pos: Tensor, seed: int,
          ) -> xr.Dataset:
    every = torch.arange(run.n_examples)
    order = torch.randperm(int(fit.sum()), generator=torch.Generator().manual_seed(seed + 1))
    others = share.clone()
    others[fit] = share[fit][order]
    fits = fit[example].numpy()
    wanted, shuffled = share[example].double().numpy(), others[example].double().numpy()
    judges = torch.nonzero(~fit)[:, 0]
    errors = np.empty((len(READERS), len(run.states), len(judges)))
    for k, state in enumerate(run.states):
        x = state[example, pos].double().numpy()
        p = run.go_on(run.n_places, state, every)[example, pos].float().softmax(-1)
        sure = torch.stack([-(p * p.clamp_min(1e-12).log()).sum(-1), p.amax(-1)], -1).double().numpy()
        sure = np.concatenate([sure, sure ** 2], 1)
        told = {"state": (x, wanted), "shuffled": (x, shuffled), "confidence": (sure, wanted),
                "both": (np.concatenate([x, sure], 1), wanted)}
        for r, reader in enumerate(READERS):
            if reader == "mean":
                predicted = np.full(len(wanted), wanted[fits].mean())
            else:
                predicted = _regressed(*told[reader], fits)
            squared = torch.from_numpy((predicted - wanted) ** 2)
            errors[r, k] = mean_by_example(squared, example, run.n_examples)[judges]
    return xr.Dataset({"error": measurement(
        errors, ("reader", "loop", "example"), coords={"reader": list(READERS), "loop": range(len(run.states))},
        units="1", long_name="squared error of the share that is masked", source=SOURCE,
        definition="; ".join(f"{reader}: {what}" for reader, what in READERS.items()))})


def _regressed(features: Float[np.ndarray, "point feature"], wanted: Float[np.ndarray, "point"], fits: np.ndarray,
               ) -> Float[np.ndarray, "point"]:
    """What a ridge regression that was fitted on some of the points says of all; features in units of their spread."""
    centre, spread = features[fits].mean(0), features[fits].std(0)
    scaled = (features - centre) / np.where(spread > 1e-9, spread, np.inf)
    return RidgeCV(ALPHAS).fit(scaled[fits], wanted[fits]).predict(scaled)


def _moved(run: Trajectory, drawn: Examples, share: Tensor, fit: Tensor, example: Tensor, pos: Tensor, loop: int,
           seed: int) -> xr.Dataset:
    state, judges = run.states[loop], torch.nonzero(~fit)[:, 0]
    on = fit[example]
    slope = slope_of(state[example, pos][on], share[example][on].to(state))
    generator = torch.Generator().manual_seed(seed + 2)
    random = torch.randn(RANDOM, len(slope), generator=generator).to(slope)
    random = random / random.norm(dim=-1, keepdim=True) * slope.norm()
    pushes = {"along": slope, **{f"random {i}": direction for i, direction in enumerate(random)}}
    clocks = Clocks.of(run, drawn.scored.long())
    values = torch.full((len(MEASURES), len(pushes), 3, len(judges)), torch.nan)
    where = drawn.scored[judges]
    for i, push in enumerate(pushes.values()):
        for s, sign in enumerate((-1, 0, 1)):
            pushed = state[judges] + sign * STEP * push * where[..., None]
            answer = run.go_on(loop, pushed, judges).float().log_softmax(-1)
            without = run.go_on(loop + 1, clocks.carry(pushed, loop, loop + 1, judges), judges).float().log_softmax(-1)
            p = answer.exp()
            by_measure = (-(p * answer).nan_to_num(0.0).sum(-1),
                          -answer.gather(-1, drawn.targets[judges][..., None])[..., 0],
                          (p * (answer - without)).nan_to_num(0.0).sum(-1))
            for m, value in enumerate(by_measure):
                values[m, i, s] = mean_over_positions(value, where)
    coords: dict[Hashable, Any] = {"push": list(pushes), "sign": [-1, 0, 1]}
    return xr.Dataset({name: measurement(value, ("push", "sign", "example"), coords=coords, units="nat", source=SOURCE,
                                         long_name=MEASURES[name],
                                         definition=f"after ± {STEP} · b was added to the state that enters loop "
                                                    f"{loop}, at masked positions")
                       for name, value in zip(MEASURES, values, strict=True)})


def slope_of(states: Float[Tensor, "point d_model"], share: Float[Tensor, "point"]) -> Float[Tensor, "d_model"]:
    """The slope of the state on the share, by least squares; 0 where all shares are the same."""
    centred = share - share.mean()
    return (centred @ (states - states.mean(0))) / centred.square().sum().clamp_min(1e-12)
