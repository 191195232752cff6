"""One optimiser step's gradient: the NELBO of a batch, in parts, in mixed precision, on one machine or many.

What is not needed is not computed: only masked positions are unembedded. A batch may be cut into
micro-batches (gradient accumulation) and shared among processes (`accelerate launch`); the gradient is
that of the whole batch either way, up to the rounding of sums.

    step = TrainingStep(model, precision="bf16", compile=True)
    loss = step.backward(batch, noised, t, n_loops=5)       # gradients are in the parameters' .grad
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks import HookedLoopMDM
from studies.tasks import Batch
from studies.training.machine import Precision, missing_for_compile

LossOn = Literal["last", "every"]


@dataclass(frozen=True)
class World:
    """The processes that train one model together, and which of them this is; World() is a process alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def broadcast(self, decision: bool) -> bool:
        """The main process's decision, for all."""
        if self.size == 1:
            return decision
        flag = [decision]
        torch.distributed.broadcast_object_list(flag, src=0)
        return flag[0]


def join() -> World:
    """Join the other processes, if ``accelerate launch`` (or torchrun) started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from accelerate import PartialState

    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or None)
    return World(state.process_index, state.num_processes)


def training_nelbo(model: HookedLoopMDM, tokens: Int[Tensor, "batch pos"], noised: Int[Tensor, "batch pos"],
                   t: Float[Tensor, "batch"], n_loops: int, *, n_free: int,
                   loss_on: LossOn = "last") -> Float[Tensor, ""]:
    """The negative ELBO of 2406.07524 in nats per free token (`hooks.model.diffusion.nelbo`), of the last loop's output
    or of every loop's, the k-th weighted by k (weights sum to 1). Divided by ``n_free``, which may count the free
    tokens of a larger batch of which this is a part.
    """
    masked = noised == model.config.mask_token_id
    rows, targets = masked.nonzero()[:, 0], tokens[masked]
    condition = model.condition(noised, t)
    condition_of_masked = None if condition is None else condition[rows]
    x, injected = model.begin(noised, condition)
    total = torch.zeros((), device=tokens.device)
    for k in range(n_loops):
        x = model.loop(x, k, injected, condition)
        if loss_on == "last" and k < n_loops - 1:
            continue
        hidden = model.tail_layers(x, condition)[masked][:, None]
        logits = model.unembed(hidden, condition_of_masked)[:, 0]
        nll = F.cross_entropy(logits.float(), targets, reduction="none")
        weight = 1.0 if loss_on == "last" else (k + 1) / (n_loops * (n_loops + 1) / 2)
        total = total + weight * (nll / t[rows]).sum() / n_free
    return total


class TrainingStep:
    """Forward and backward of one batch on ``model``.

    ``precision`` "bf16" runs matrix products in bfloat16 (weights, optimiser and residual stream stay in float32);
    ``compile`` has torch compile the blocks, which needs a C++ compiler on a CPU. Raises RuntimeError without one.
    What the machine does fast is in `studies.training.machine`: "bf16" runs on any CPU, without instructions slowly.
    """

    def __init__(self, model: HookedLoopMDM, *, precision: Precision = "fp32", compile: bool = False,
                 loss_on: LossOn = "last", micro_batches: int = 1, world: World | None = None):
        self.model, self.loss_on, self.micro_batches = model, loss_on, micro_batches
        self.world = world or World()
        self.device = next(model.parameters()).device.type
        self.precision = precision
        if compile:
            if (missing := missing_for_compile(self.device)) is not None:
                raise RuntimeError(f"compile needs a C++ compiler, and {missing}: install it, or train with compile "
                                   "off.")
            for block in model.blocks:
                block.compile(dynamic=False)

    def backward(self, batch: Batch, noised: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"],
                 n_loops: int) -> float:
        """Set the parameters' gradients to those of the whole batch's NELBO; returns it, in nats per free token."""
        n_free = int(batch.free.sum())
        loss = 0.0
        for part in range(self.world.rank, self.micro_batches * self.world.size, self.world.size):
            rows = slice(part, None, self.micro_batches * self.world.size)
            tokens, seen, level = (x[rows].to(self.device) for x in (batch.tokens, noised, t))
            with self._autocast():
                value = training_nelbo(self.model, tokens, seen, level, n_loops, n_free=n_free, loss_on=self.loss_on)
            value.backward()
            loss += float(value.detach())
        return self._summed(loss)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def _summed(self, loss: float) -> float:
        """Sum gradients and loss over processes."""
        if self.world.size == 1:
            return loss
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        value = torch.tensor([loss], device=self.device)
        flat = torch.cat([value, *(p.grad.flatten() for p in parameters if p.grad is not None)])
        torch.distributed.all_reduce(flat)
        at = 1
        for p in parameters:
            p.grad = flat[at:at + p.numel()].view_as(p)
            at += p.numel()
        return float(flat[0])
