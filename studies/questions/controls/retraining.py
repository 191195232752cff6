"""A few steps of training after surgery, so that the loops of what was cut up work again.

    batches = task_batches(load_task({"name": "automaton", "rule": 30, "width": 12, "rows": 8}), seed=1)
    retrained(model, batches, steps=100, n_loops=4)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.model.diffusion import antithetic_t, corrupt
from studies.tasks import Task
from studies.training.step import training_nelbo

Batches = Callable[[int], tuple[Int[Tensor, "example pos"], Bool[Tensor, "example pos"]]]
"""From the number of a step: clean tokens, and which positions are free to be masked."""


def task_batches(task: Task, *, batch_size: int = 32, seed: int = 0) -> Batches:
    """Batches of a task's training split, others at every step and seed."""
    def batch(step: int) -> tuple[Tensor, Tensor]:
        made = task.sample(batch_size, seed=1_000_003 * (seed + 1) + step)
        return made.tokens, made.free

    return batch


def retrained(model: HookedLoopMDM, batches: Batches, *, steps: int, n_loops: int, lr: float = 2e-3,
              seed: int = 0) -> HookedLoopMDM:
    """``model`` after ``steps`` steps of AdamW on its NELBO (the objective it was trained with), in place.

    Each step runs a number of loops drawn from 1 … ``n_loops``. The learning rate rises over a tenth of the steps and
    falls to 0. Returned in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1.0, 10 * (step + 1) / steps, 1.1 * (1 - step / steps)))
    for step in range(steps):
        tokens, free = batches(step)
        t = antithetic_t(len(tokens), generator=generator)
        noised = corrupt(tokens, t, model.config.mask_token_id, free=free, generator=generator)
        drawn = int(torch.randint(1, n_loops + 1, (), generator=generator))
        loss = training_nelbo(model.train(), tokens, noised, t, drawn, n_free=int(free.sum()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
