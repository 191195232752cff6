"""What chance decides at each step of training: examples, masks, the number of loops; and the learning rate there.

All of it follows from the seed, the step and the FLOPs spent, which a checkpoint holds: a resumed run draws the same.

    batch = draw_examples(task, 32, 0, curriculum="none", spent=0.3)
    masked = draw_masks(batch.tokens, batch.free, task.mask_token_id, masks="exact", generator=generator)
    n_loops = 1 + int(torch.multinomial(loop_weights(model, task.seq_len, "growth", spent=0.3), 1, generator=generator))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import LoopMDMConfig
from hooks.model.diffusion import NoiseLevels, antithetic_t, corrupt, corrupt_exactly, exact_t
from studies.tasks import Batch, Task
from studies.training.flops import training_flops

LoopsDrawn = Literal["uniform", "growth", "equal_flops"]
Masks = Literal["bernoulli", "exact"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Curriculum = Literal["none", "growth"]

GROWN_AT = 0.5
"""Share of the FLOPs budget at which growing loop counts reach S_max, and a curriculum the whole task."""
FLOOR = 0.1
"""Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class Masked:
    """A batch's noise levels, and its tokens with the masked ones replaced."""

    t: Float[Tensor, "example"]
    noised: Int[Tensor, "example pos"]


def draw_examples(task: Task, n: int, seed: int, *, curriculum: Curriculum, spent: float) -> Batch:
    """Training examples once a share ``spent`` of the FLOPs budget is spent: the task's, or those of its curriculum
    (`Task.curriculum`), which ends at `GROWN_AT`. ValueError for the curriculum of a task that has none."""
    if curriculum == "none":
        return task.sample(n, seed=seed)
    return task.curriculum(n, seed=seed, grown=min(1.0, spent / GROWN_AT))


def draw_masks(tokens: Int[Tensor, "example pos"], free: Bool[Tensor, "example pos"], mask_token_id: int, *,
               masks: Masks, levels: NoiseLevels = "uniform", generator: torch.Generator) -> Masked:
    """Noise levels and masks of a batch: each token for itself, or an exact number (`hooks.model.diffusion`)."""
    if masks == "exact":
        t = exact_t(free.sum(1), levels=levels, generator=generator)
        return Masked(t, corrupt_exactly(tokens, t, mask_token_id, free=free, generator=generator))
    t = antithetic_t(len(tokens), levels=levels, generator=generator)
    return Masked(t, corrupt(tokens, t, mask_token_id, free=free, generator=generator))


def loop_weights(model: LoopMDMConfig, seq_len: int, drawn: LoopsDrawn, spent: float = 0.0) -> Float[Tensor, "loop"]:
    """Relative frequency of S = 1 … S_max in training, once a share ``spent`` of the FLOPs budget is spent.

    "uniform": S ~ U{1..S_max} (2605.26106). "growth": S ~ U{1..1 + (S_max − 1) · min(1, 2 · spent)}, the upper end
    rounded to the nearest whole number, halves up; the first steps, which learn what one pass can, are then cheap and
    many. "equal_flops": in inverse proportion to the FLOPs of S loops, so that each S is given the same share of them.
    """
    s = torch.arange(1, model.max_loops + 1)
    if drawn == "equal_flops":
        return 1 / torch.tensor([training_flops(model, seq_len=seq_len, n_loops=int(n)) for n in s])
    if drawn == "uniform":
        return torch.ones(model.max_loops)
    return (s <= 1 + math.floor((model.max_loops - 1) * min(1.0, spent / GROWN_AT) + 0.5)).float()


def rate(schedule: Schedule, spent: float, decay_share: float) -> float:
    """Learning rate as a share of the peak, after warm-up, once a share ``spent`` of the FLOPs budget is spent.

    "cosine" and "linear" fall from 1 to `FLOOR` over the whole budget. "wsd" (warm-up–stable–decay, 2404.06395) stays
    at 1 until the last ``decay_share`` of it and falls linearly there: a run's stable part is that of any longer run.
    """
    spent = min(1.0, spent)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * spent)), "linear": 1 - spent, "constant": 1.0,
            "wsd": min(1.0, (1 - spent) / decay_share)}[schedule]
    return FLOOR + (1 - FLOOR) * left
