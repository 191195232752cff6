"""What each loop adds to the answer, with the nulls that a curve over loops carries.

- *prefix(k)*: the first k loops, then the rest of the network after the loop;
- *skip(k)*: the whole run without the work of loop k (its clock moves on, see `probes.exchange`);
- *repeat(k)*: loop 0 applied k times, each time as loop 0; *suffix(k)*: only the last k loops (2609.19934);
- *line(k)*: the state extrapolated from those after loops 1 and 2: h_1 + (k − 1)(h_2 − h_1). A loop works only as far
  as it beats the line.

A state that was cut short is out of the readout's distribution. Every NLL is therefore read with a readout
recalibrated for its own kind and number of loops on the other half of the examples (`probes.calibration`).

    found = gains(model, inputs, own_loops(model.topology(4)), targets=clean)
    found.prefix.mean(("example", "pos"))                     # nats after 0 … 4 loops
"""

from __future__ import annotations

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks.contract import Inputs, Levels, LoopedModel
from probes.calibration import calibrated, log_prior
from probes.cycles import Cycle
from probes.exchange import (
    ROWS,
    ClockKind,
    Clocks,
    Trajectory,
    checked_roles,
    checked_scored,
    group_of,
    halves_of,
)
from probes.measurement import measurement

SOURCE = "ours; repeat and suffix after 2609.19934, recalibration after 1706.04599"


@torch.no_grad()
def gains(model: LoopedModel, inputs: Inputs, cycle: Cycle, *, targets: Int[Tensor, "batch answer"],
          scored: Bool[Tensor, "batch answer"] | None = None, roles: Int[Tensor, "batch pos"] | None = None,
          t: Levels = None, clock: ClockKind = "role", trajectory: Trajectory | None = None,
          rows: int = ROWS) -> xr.Dataset:
    """Calibrated NLL [nat] of the targets per example and position, NaN where a position is not scored.

    ``prefix`` [loops, example, pos] after 0 … K loops, with ``right`` (1 where the answer is the target);
    ``repeat``, ``suffix`` and ``line`` likewise, NaN where they are not defined; ``skip`` [loop, example, pos]; and
    ``prior`` [example, pos], of the answers' frequencies alone. Raises ValueError for targets that do not fit.
    """
    run = trajectory or Trajectory.of(model, inputs, cycle, t=t)
    where = checked_scored(model, inputs, run, scored)
    check_targets(targets, where)
    halves = halves_of(run.n_examples)
    clocks = Clocks.of(run, group_of(checked_roles(roles, where, run), clock))
    reader = _Reader(run, targets, where, halves, rows)
    n_loops, h = run.n_places, run.states
    repeated = [h[0]]
    for _ in range(n_loops):
        repeated.append(torch.cat([run.operate(0, repeated[-1][some], some) for some in reader.chunks]))
    every = torch.arange(run.n_examples)
    end = n_loops
    prefix = [reader(end, h[k]) for k in range(n_loops + 1)]
    stacks = {
        "prefix": [nll for nll, _ in prefix],
        "right": [right for _, right in prefix],
        "repeat": [prefix[0][0], *(reader(end, repeated[k])[0] for k in range(1, n_loops + 1))],
        "suffix": [prefix[0][0], *(reader(n_loops - k, h[0])[0] for k in range(1, n_loops)),
                   prefix[-1][0]],
        "line": [reader(end, h[1] + (k - 1) * (h[2] - h[1]))[0] if k > 2 else
                 torch.full_like(prefix[0][0], torch.nan) for k in range(n_loops + 1)],
    }
    skip = [reader(k + 1, clocks.carry(h[k], k, k + 1, every))[0] for k in range(n_loops)]
    told = {"prefix": "NLL after some loops", "right": "answers that are right", "repeat": "NLL when loop 0 repeats",
            "suffix": "NLL of the last loops alone", "line": "NLL on the straight line"}
    dims = ("loops", "example", "pos")
    units = {"right": "1"}
    variables = {name: measurement(torch.stack(values), dims, long_name=told[name], units=units.get(name, "nat"),
                                   definition=f"{name}(k), recalibrated on the other half of the examples",
                                   source=SOURCE, coords={"loops": range(n_loops + 1)})
                 for name, values in stacks.items()}
    variables["skip"] = measurement(torch.stack(skip), ("loop", *dims[1:]), units="nat", source=SOURCE,
                                    long_name="NLL without the work of a loop",
                                    definition="skip(k), recalibrated on the other half of the examples")
    variables["prior"] = measurement(reader.prior(), dims[1:], long_name="NLL of the answers' frequencies",
                                     units="nat", source=SOURCE,
                                     definition="−log of the target's frequency in the other half of the examples")
    return xr.Dataset(variables)


def check_targets(targets: Int[Tensor, "batch target"], scored: Bool[Tensor, "batch answer"]) -> None:
    """ValueError for targets of another shape, of another type, or without an answer at a scored position."""
    if targets.shape != scored.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, the answers {tuple(scored.shape)}.")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets are classes of the readout, whole numbers, not {targets.dtype}.")
    if bool((targets[scored] < 0).any()):
        raise ValueError("a scored position has no target (it is negative): leave it out of scored=….")


class _Reader:
    """Reads states as NLLs of the targets, each kind of state with a readout of its own calibration."""

    def __init__(self, run: Trajectory, targets: Tensor, scored: Tensor, halves: Tensor, rows: int):
        self.run, self.scored = run, scored
        self.chunks = torch.arange(run.n_examples).split(rows)
        self.truth = targets[scored].long().cpu()
        self.half = halves[:, None].expand_as(scored.cpu())[scored.cpu()]

    def __call__(self, place: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """NLL and correctness [example, pos] when a state enters a place."""
        logits = torch.cat([self.run.go_on(place, state[some], some)[self.scored[some]].float().cpu()
                            for some in self.chunks])
        if int(self.truth.max()) >= logits.shape[-1]:
            raise ValueError(f"targets go up to {int(self.truth.max())}, the readout has {logits.shape[-1]} classes.")
        right = (logits.argmax(-1) == self.truth).float()
        wanted = F.one_hot(self.truth, logits.shape[-1]).float()
        return self._spread(calibrated(logits, wanted, self.half)), self._spread(right)

    def prior(self) -> Float[Tensor, "example answer"]:
        wanted = F.one_hot(self.truth).float()
        nll = torch.empty(len(self.truth))
        for judged in (False, True):
            nll[self.half == judged] = -log_prior(wanted[self.half != judged])[self.truth[self.half == judged]]
        return self._spread(nll)

    def _spread(self, values: Float[Tensor, "point"]) -> Float[Tensor, "example answer"]:
        full = torch.full(self.scored.shape, torch.nan)
        full[self.scored.cpu()] = values
        return full
