"""Recalibrated lenses (2609.19934): what a lens tells apart from how sure it is, or how its answers are distributed.

A state that was cut short is out of the readout's distribution. ``temperature`` divides the lens's logits by one number
per depth, ``affine`` scales them and adds a bias per token; both are fitted on the NLL of the targets of other
examples. What a loop gains beyond that is not calibration.

    lens = RecalibratedLens.fit(model, noised, tokens, n_loops=4, base="coda", mode="affine")
    read_lens(model, noised, n_loops=4, kind=lens, targets=tokens)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks.contract import Context, Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.gains import check_targets
from probes.lenses.base import CodaLens, Lens, LogitLens
from probes.lenses.fitted import Fit, FittedLens, weights_hash

Mode = Literal["temperature", "affine"]
Base = Literal["logit", "coda"]

LENSES: dict[Base, type[Lens]] = {"logit": LogitLens, "coda": CodaLens}

FIT_ELEMENTS = 2 ** 26
"""Logits that a fit holds, at most (256 MB): of more positions, evenly spaced ones are taken."""

RIDGE = 1e-3
"""Weight of the pull of log scale and biases towards 0, in nats per squared unit."""


class RecalibratedLens(FittedLens):
    """logits = a · base(X) + b per depth: a ≥ 0 alone (temperature 1 / a), or with a bias per token."""

    kind = "recalibrated"
    definition = "logits = a · lens(X) + b, a and b of the depth, fitted on the NLL of the targets of other examples"
    source = "arXiv 2609.19934; temperature scaling 1706.04599"

    @classmethod
    def fit(cls, model: LoopedModel, inputs: Inputs, targets: Int[Tensor, "batch pos"] | None = None, *,
            n_loops: int | None = None, t: Levels = None, base: Base = "coda", mode: Mode = "temperature",
            scored: Bool[Tensor, "batch pos"] | None = None, seed: int = 0, rows: int = 32) -> RecalibratedLens:
        """Fit on 85% of the examples by L-BFGS, judge on the rest.

        ``targets`` are clean tokens, by default next tokens. Raises ValueError for an unknown base or mode, targets
        that do not fit, fewer examples than the parts need, and states that are not finite.
        """
        if base not in LENSES or mode not in get_args(Mode):
            raise ValueError(f"base is one of {', '.join(LENSES)} and mode one of {', '.join(get_args(Mode))}, not "
                             f"{base!r} and {mode!r}.")
        truth = model.targets(inputs) if targets is None else targets
        if truth is None:
            raise ValueError("the inputs do not hold the answers: give clean tokens, targets=….")
        with model.exclusive():
            if scored is None and truth.shape == (known := model.scored(inputs)).shape:
                scored = known.bool() & (truth.to(known.device) >= 0)
            fit, lens = Fit(model, inputs, n_loops, t, scored, seed, rows), LENSES[base]()
            check_targets(truth.cpu(), fit.scored)
            chosen, stride = torch.cat([fit.fitted, fit.stopping]), 1
            scale, bias = [], []
            for depth in range(fit.topology.depth):
                logits, wanted = [], []
                for some, run in fit.passes(chosen):
                    where = fit.scored[some]
                    with torch.no_grad():
                        read = lens.logits(model, run.states[depth + 1], run.context, torch.full((len(some),), depth))
                    stride = -(-int(fit.scored[chosen].sum()) * read.shape[-1] // FIT_ELEMENTS)
                    logits.append(read[where.to(read.device)].float()[::stride])
                    wanted.append(truth[some][where].to(read.device).long()[::stride])
                a, b = _fitted(torch.cat(logits), torch.cat(wanted), mode)
                scale.append(a)
                bias.append(b)
            weights = {"a": torch.stack(scale)} | ({"b": torch.stack(bias)} if mode == "affine" else {})
            made = cls(weights, topology=fit.topology, model_hash=weights_hash(model), held_out=fit.no_scores(),
                       options={"base": base, "mode": mode, "seed": seed})
            made.held_out = fit.judge(made, lens, truth)
        return made

    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        read = LENSES[self.options["base"]]().logits(model, state, context, depth)
        a = self.weights["a"][depth.cpu()].to(read)[:, None, None]
        b = self.weights["b"][depth.cpu()].to(read)[:, None] if "b" in self.weights else 0.0
        return a * read + b

    def own_from(self, topology: Topology) -> int:
        return topology.depth


def _fitted(logits: Float[Tensor, "point vocab"], wanted: Int[Tensor, "point"], mode: Mode,
            ) -> tuple[Float[Tensor, ""], Float[Tensor, "vocab"]]:
    """The a and b of the smallest NLL with a small pull towards 1 and 0; convex in a and b."""
    logits = (logits - logits.amax(-1, keepdim=True)).clamp_min(-1e4)   # what is ruled out has a slope of 0, not NaN
    log_a = logits.new_zeros((), requires_grad=True)
    b = logits.new_zeros(logits.shape[-1], requires_grad=mode == "affine")
    free = [log_a, b] if mode == "affine" else [log_a]
    optimizer = torch.optim.LBFGS(free, max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (F.cross_entropy(log_a.exp() * logits + b, wanted)
                 + RIDGE / 2 * (log_a.square() + b.square().sum()))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return log_a.detach().exp(), b.detach()
