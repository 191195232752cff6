"""What a lens is: it turns the state after a layer into logits. The two that need no fitting are here.

The **logit lens** reads a state directly, unembed(X). The **coda lens** first runs the layers after the loop on it:
"what if looping stopped here". Fitted lenses have a file each: `probes.lenses.tuned`, `.jacobian`, `.recalibrated`.

    logits = CodaLens().logits(model, state, context, torch.full((3,), 2))       # [row, pos, vocab], all after depth 2
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.contract import Context, LoopedModel
from hooks.topology import Topology


class Lens(ABC):
    """A way to read states. ``kind``, ``definition`` and ``source`` label what it reads."""

    kind: str
    definition: str
    source: str

    @abstractmethod
    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        """What it reads from states, each the state after the layer at its own ``depth``."""

    def own_from(self, topology: Topology) -> int:
        """The first depth at which, and after which, it reads the model's own answer by definition."""
        return topology.depth - 1

    def check(self, model: LoopedModel, topology: Topology) -> None:  # noqa: B027 - one that was not fitted reads any
        """Raise ValueError if it cannot read this model in a run of this layout."""


class LogitLens(Lens):
    """unembed(ln_final(X)), nostalgebraist 2020."""

    kind = "logit"
    definition = "logits = unembed(ln_final(X)) at each depth"
    source = "nostalgebraist 2020, interpreting GPT: the logit lens"

    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        return model.read(state, context)


class CodaLens(Lens):
    """tail(X), 2507.02199: the model's answer if looping stopped at this state."""

    kind = "coda"
    definition = ("logits = tail(X), all of the tail, for states of head and loops; for a state inside the tail, "
                  "the layers that remain, which give the model's own output")
    source = "arXiv 2507.02199"

    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        start = (depth + 1).clamp_min(loops_end(context.topology))
        parts = start.unique().tolist()
        if len(parts) == 1:
            return model.resume(parts[0], state, context)
        found = [torch.nonzero(start == first)[:, 0] for first in parts]
        answers = [model.resume(first, state[rows.to(state.device)], context.rows(rows))
                   for first, rows in zip(parts, found, strict=True)]
        return torch.cat(answers)[torch.cat(found).argsort().to(answers[0].device)]

    def own_from(self, topology: Topology) -> int:
        return loops_end(topology) - 1


def loops_end(topology: Topology) -> int:
    """The depth of the first layer after the last loop."""
    return topology.n_head + topology.n_loops * topology.n_mid


def divergence(log_q: Float[Tensor, "*row vocab"], log_p: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(q ‖ p) [nat]; an answer that is ruled out in both adds nothing."""
    return (log_q.exp() * (log_q - log_p)).nan_to_num(0.0).sum(-1)
