"""What is measured of loops × denoising steps: exchanges between the loops of two steps, and the restart test.

    found = measure([model], drawn, n_loops=4, share=1 / 3)
    found.kl.sel(step="before"), found.work, found.nll.sel(way="restart")

**Two steps.** A step sees an input with masks. The next one sees the same input in which the model's own most probable
tokens stand at a ``share`` of the masked positions, those of which it is surest. No state is handed on: a step begins
with the head. What may be handed on is where the loops stand: a content of the later step is put on the clock that
loop j had in the *earlier* step, worked on by the loop, and brought back (τ of `probes.exchange`, between steps).

**Restart.** After k + 1 loops the surest half of the answers is written into the input and one loop is run from
scratch. Its NLL is read at the positions that are masked still, beside that of one more loop at the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import LoopedModel
from probes.causal import nll_of
from probes.cycles import own_loops
from probes.exchange import Clocks, Trajectory, exchange
from probes.measurement import mean_over_positions, measurement
from studies.questions.stage_test.subjects import Examples

STEPS = ("same", "before")
"""On whose clocks a loop works: those of the content's own step, or those of the step before."""

WAYS = {
    "stay": "after k + 1 loops",
    "go on": "after k + 2 loops",
    "restart": "one loop from scratch, the surest half of the answers after k + 1 loops written into the input",
    "true tokens": "the same with the true tokens written",
    "other tokens": "the same with the tokens that another example has there",
    "afresh": "one loop, nothing written",
}
"""What is read at the positions that are masked in all of them."""

WRITTEN = 0.5
"""Share of the masked positions that a restart writes."""

SOURCE = "ours: loops × denoising steps"


class EarlierClocks(Clocks):
    """The clocks of a run, with those of another run for the operations: a content is put on a clock that its loop had
    there, and what became of it goes on by its own."""

    def __init__(self, own: Clocks, earlier: Clocks):
        super().__init__(own.means, own.scales, own.groups, own.folds)
        self.earlier = Clocks(earlier.means, earlier.scales, own.groups, own.folds)

    def carry(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.earlier.moved(state, (self.means[:, source], self.scales[:, source]), to, rows)


@torch.no_grad()
def measure(models: Sequence[LoopedModel], drawn: Examples, *, n_loops: int, share: float) -> xr.Dataset:
    """Per example, those of all models one after another.

    ``kl`` [step, content, operation, example] and ``work`` [content, example], nats, of the later step; ``distance``
    [loop, loop_before, example]: how far a state of the later step lies from one of the earlier step at the positions
    masked in both, relative to its distance from that of another example (1: no nearer); ``nll`` [way, loop, example].
    """
    parts = [xr.merge([_between_steps(model, drawn, n_loops, share), _restarted(model, drawn, n_loops)])
             for model in models]
    return xr.concat(parts, "example", coords="minimal", compat="override")


def _between_steps(model: LoopedModel, drawn: Examples, n_loops: int, share: float) -> xr.Dataset:
    cycle = own_loops(model.topology(n_loops))
    answer = model(drawn.inputs, n_loops, t=drawn.t)
    written = surest(answer, drawn.scored, share)
    after = torch.where(written, answer.argmax(-1), drawn.inputs)
    masked = drawn.scored & ~written
    level = None if drawn.t is None else drawn.t * (1 - share)
    first = Trajectory.of(model, drawn.inputs, cycle, t=drawn.t)
    second = Trajectory.of(model, after, cycle, t=level)
    own = Clocks.of(second, masked.long())
    clocks = {"same": own, "before": EarlierClocks(own, Clocks.of(first, drawn.scored.long()))}
    found = {step: exchange(model, after, cycle, trajectory=second, frame=clocks[step], scored=masked)
             for step in STEPS}
    together = xr.concat([found[step].kl for step in STEPS], "step", coords="minimal", compat="override")
    loops = range(n_loops)
    kl = measurement(together.values, ("step", "content", "operation", "example"), units="nat", source=SOURCE,
                     long_name="divergence after an exchange", coords={"step": list(STEPS), "content": loops,
                                                                       "operation": loops},
                     definition="KL(clean ‖ exchange) of the later step, with the clocks of its own step or of the one "
                                "before")
    work = measurement(found["same"].work.values, ("content", "example"), units="nat", source=SOURCE,
                       long_name="work", coords={"content": loops}, definition="KL(clean ‖ skip(k)) of the later step")
    return xr.Dataset({"kl": kl, "work": work, "distance": _distance(first, second, masked)})


def surest(answer: Float[Tensor, "example pos vocab"], scored: Bool[Tensor, "example pos"], share: float,
           ) -> Bool[Tensor, "example pos"]:
    """The ``share`` of each example's scored positions (rounded) whose most probable token is most probable; at least
    one stays unwritten."""
    sure = answer.float().softmax(-1).amax(-1).masked_fill(~scored, -1.0)
    number = scored.sum(1)
    quota = (share * number).round().long().clamp_max((number - 1).clamp_min(0))
    return (sure.argsort(1, descending=True).argsort(1) < quota[:, None]) & scored


def _distance(first: Trajectory, second: Trajectory, masked: Bool[Tensor, "example pos"]) -> xr.DataArray:
    """How far states of the later step lie from those of the earlier one, relative to those of another example."""
    def apart(late: Tensor, early: Tensor) -> Tensor:
        return mean_over_positions((late - early).norm(dim=-1), masked)

    values = torch.stack([torch.stack([apart(late, early) / apart(late, early.roll(1, 0)).clamp_min(1e-12)
                                       for early in first.states]) for late in second.states])
    loops = range(len(first.states))
    return measurement(values, ("loop", "loop_before", "example"), units="1", source=SOURCE,
                       coords={"loop": loops, "loop_before": loops},
                       long_name="distance of states, relative to another example's",
                       definition="‖h_k − g_j‖ ÷ ‖h_k − g_j of the example before‖, h of the later step, g of the "
                                  "earlier, means over positions masked in both; loop 0 is what enters the loops")


def _restarted(model: LoopedModel, drawn: Examples, n_loops: int) -> xr.Dataset:
    levels = None if drawn.t is None else drawn.t * (1 - WRITTEN)
    answers = [model(drawn.inputs, s, t=drawn.t) for s in range(1, n_loops + 1)]
    values = []
    for k in range(n_loops - 1):
        written = surest(answers[k], drawn.scored, WRITTEN)
        left = drawn.scored & ~written
        tokens = {"restart": answers[k].argmax(-1), "true tokens": drawn.targets,
                  "other tokens": drawn.targets.roll(1, 0)}
        read = {"stay": answers[k], "go on": answers[k + 1], "afresh": answers[0]} | {
            way: model(torch.where(written, new, drawn.inputs), 1, t=levels) for way, new in tokens.items()}
        nll = nll_of(drawn.targets, left)
        values.append(torch.stack([nll(read[way], torch.arange(len(left))) for way in WAYS]))
    read_out = measurement(torch.stack(values, 1), ("way", "loop_written", "example"), units="nat", source=SOURCE,
                      coords={"way": list(WAYS), "loop_written": range(n_loops - 1)},
                      long_name="NLL at the positions that are masked still",
                      definition="; ".join(f"{way}: {what}" for way, what in WAYS.items()))
    return xr.Dataset({"nll": read_out})
