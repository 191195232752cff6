"""What a training run measures of itself on held-out examples, and whether its loops are used.

A model whose loops each add the same vector gets nothing from them that one larger step would not give: its states
lie on a line. So the NELBO is measured after 1, 2, 4 … S_max loops, and once more with the state after S loops
replaced by the straight line through the states after loops 0 and 1, read by the tail.

    row = held_out(model, task, examples=256)
    row["nelbo@4"], row["nelbo_line@4"], row["exact@8"], row["cells_row2@8"]
    idle_loops(row, s_max=8)          # a sentence, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.model.diffusion import nelbo
from probes.loops import loop_states
from studies.tasks import Batch, Task
from studies.training.draws import draw_masks

IDLE = 0.01
"""Nats per free token that loops must gain, over one loop and over the straight line, to count as used."""


def doubled_loops(s_max: int) -> list[int]:
    """1, 2, 4 … and S_max."""
    return sorted({2 ** i for i in range(s_max.bit_length())} | {s_max})


@torch.no_grad()
def held_out(model: HookedLoopMDM, task: Task, *, examples: int) -> dict[str, float]:
    """Accuracy with every free position masked, in one forward, and the NELBO, at 1, 2, 4 … S_max loops.

    ``cells@S`` and ``exact@S``: shares (`Task.score`); ``cells_hop3@S`` and the like: the share of each region's free
    cells, at S_max, of a task that has several regions (named by `Task.region_name`). ``nelbo@S``: nats per free token,
    with exact mask sizes, the same masks at each call; ``nelbo`` is that of S_max. ``nelbo_line@S``, from S = 3 on: the
    same with the state after S loops replaced by the line through those after loops 0 and 1,
    H(1) + (S − 1) · (H(2) − H(1)) (ours).
    """
    device = next(model.parameters()).device
    batch = task.sample(examples, seed=0, split="test")
    tokens, free = batch.tokens.to(device), batch.free.to(device)
    s_max = model.config.max_loops
    row: dict[str, float] = {}
    everything = tokens.masked_fill(free, task.mask_token_id)
    for n_loops, (logits, _) in _answers(model, everything, torch.ones(examples, device=device)).items():
        predicted = logits.argmax(-1).cpu()
        for name, value in task.score(predicted, batch).items():
            row[f"{name}@{n_loops}"] = float(value.mean())
    if len(shares := by_region(predicted, batch, task.regions())) > 1:
        row |= {f"cells_{task.region_name}{region}@{s_max}": share for region, share in shares.items()}
    generator = torch.Generator().manual_seed(1)
    masked = draw_masks(batch.tokens, batch.free, task.mask_token_id, masks="exact", generator=generator)
    noised, t = masked.noised.to(device), masked.t.to(device)
    for n_loops, (logits, line) in _answers(model, noised, t).items():
        row[f"nelbo@{n_loops}"] = float(nelbo(logits, tokens, noised, t, task.mask_token_id, free=free))
        if line is not None:
            row[f"nelbo_line@{n_loops}"] = float(nelbo(line, tokens, noised, t, task.mask_token_id, free=free))
    row["nelbo"] = row[f"nelbo@{s_max}"]
    return row


def by_region(predicted: Int[Tensor, "example pos"], batch: Batch,
              regions: Int[Tensor, "pos"]) -> dict[int, float]:
    """The share of right ones among the free cells of each region (a number per position) that has any."""
    right = (predicted == batch.tokens) & batch.free
    counts = {int(region): (int(right[:, regions == region].sum()), int(batch.free[:, regions == region].sum()))
              for region in regions.unique()}
    return {region: hits / cells for region, (hits, cells) in counts.items() if cells}


def idle_loops(row: Mapping[str, float], s_max: int) -> str | None:
    """What shows that the loops of a model evaluated by `held_out` are not used; None if they are, or there is one."""
    if s_max == 1:
        return None
    gain = row["nelbo@1"] - row[f"nelbo@{s_max}"]
    if gain < IDLE:
        return f"loops are idle: from S = 1 to S = {s_max} the held-out NELBO falls by {gain:.3f} nat, below {IDLE}"
    beyond = row.get(f"nelbo_line@{s_max}", float("inf")) - row[f"nelbo@{s_max}"]
    if beyond < IDLE:
        return (f"loops are idle: at S = {s_max} the held-out NELBO is {beyond:.3f} nat below what a straight line "
                f"through the states after the first two loops gives, less than {IDLE}")
    return None


# ------------------------------------------------------------------------------- private

Logits = Float[Tensor, "batch pos vocab"]


def _answers(model: HookedLoopMDM, noised: Int[Tensor, "batch pos"],
             t: Float[Tensor, "batch"]) -> dict[int, tuple[Logits, Logits | None]]:
    """By number of loops: the logits, and from three loops on those of the straight line. One run of S_max loops."""
    counts, first, found = doubled_loops(model.config.max_loops), [], {}
    states = islice(loop_states(model, noised, t=t), 1, None)
    for n_loops, (state, context) in enumerate(states, start=1):
        if n_loops <= 2:
            first.append(state)
        if n_loops in counts:
            line = None if n_loops <= 2 else model.coda(first[0] + (n_loops - 1) * (first[1] - first[0]), context)
            found[n_loops] = model.coda(state, context), line
    return found
