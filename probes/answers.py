"""Answers judged: what is asked of a model, and what its answer becomes when a state is changed on the way.

    truth, scored = asked(model, noised, run.logits, tokens, None)
    judge = Judge(run.logits, truth, scored)
    nll, kl, accuracy, exact = of_versions(model, depth, versions, run.context, judge)      # each [version, example]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Context, Inputs, LoopedModel
from probes.gains import check_targets
from probes.measurement import mean_over_positions, measurement

ROWS = 256
"""Examples that one forward holds, by default."""


class Judge:
    """The measures of an answer, each a number per example: `MEASURES` in their order."""

    MEASURES: Mapping[str, tuple[str, str, Literal["rise", "fall"]]] = {
        "nll": ("NLL of the targets", "nat", "rise"), "kl": ("divergence from the clean answer", "nat", "rise"),
        "accuracy": ("share of right answers", "1", "fall"),
        "exact": ("examples whose answers are all right", "1", "fall")}
    """Long name and units, and which way it changes where an answer gets worse."""

    def __init__(self, clean: Tensor, targets: Tensor, scored: Tensor):
        self.clean, self.targets, self.scored = clean.float().log_softmax(-1), targets, scored

    def __call__(self, logits: Float[Tensor, "row pos vocab"], rows: Int[Tensor, "row"],
                 ) -> Float[Tensor, "measure row"]:
        log_p, clean = logits.float().log_softmax(-1), self.clean[rows]
        scored, truth = self.scored[rows], self.targets[rows]
        nll = -log_p.gather(-1, truth.clamp_min(0)[..., None])[..., 0]
        kl = (clean.exp() * (clean - log_p)).nan_to_num(0.0).sum(-1)
        right = (logits.argmax(-1) == truth).float()
        accuracy = mean_over_positions(right, scored)
        return torch.stack([mean_over_positions(nll, scored), mean_over_positions(kl, scored), accuracy,
                            torch.where(accuracy.isnan(), torch.nan, (accuracy == 1).float())]).cpu()


def asked(model: LoopedModel, inputs: Inputs, logits: Tensor, targets: Tensor | None, scored: Tensor | None,
           ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Targets and scored positions on the device of the answer, checked."""
    truth = model.targets(inputs) if targets is None else targets
    if truth is None:
        raise ValueError("the inputs do not hold the answers: give clean tokens, targets=….")
    where = (model.scored(inputs) if scored is None else scored).bool()
    if where.shape != logits.shape[:2]:
        raise ValueError(f"scored has shape {tuple(where.shape)}, the answers have [batch, pos] = "
                         f"{tuple(logits.shape[:2])}.")
    if scored is None and truth.shape == where.shape:
        where = where & (truth.to(where.device) >= 0)
    if not bool(where.any()):
        raise ValueError("no position is scored: there is no answer that could change. Give a mask, scored=….")
    check_targets(truth.cpu(), where.cpu())
    return truth.to(logits.device).long(), where.to(logits.device)


def places(at: Tensor | None, state: Tensor) -> Bool[Tensor, "batch pos 1"]:
    if at is None:
        return torch.ones_like(state[..., :1], dtype=torch.bool)
    if at.shape != state.shape[:2]:
        raise ValueError(f"at has shape {tuple(at.shape)}, the states have [batch, pos] = {tuple(state.shape[:2])}.")
    return at.to(state.device).bool()[..., None]


def of_versions(model: LoopedModel, depth: int, versions: Float[Tensor, "version batch pos d_model"], context: Context,
                judge: Callable[[Tensor, Tensor], Tensor], rows: int = ROWS) -> Float[Tensor, "measure version batch"]:
    """What ``judge`` says of the answers when each version of the state enters a depth."""
    n_versions, n = versions.shape[:2]
    flat, parts = versions.flatten(0, 1), []
    for some in torch.arange(len(flat)).split(rows):
        parts.append(judge(model.resume(depth, flat[some.to(flat.device)], context.rows(some % n)), some % n))
    return torch.cat(parts, -1).unflatten(-1, (n_versions, n))


def changes(found: Float[Tensor, "measure *place example"], clean: Float[Tensor, "measure example"],
            dims: tuple[str, ...], coords: Mapping[Any, Any], definition: str, source: str,
            n_loops: int) -> xr.Dataset:
    """Measurements of how much worse the answers are than the clean ones: rises and falls, above 0 where worse."""
    variables = {}
    for m, (name, (long_name, units, change)) in enumerate(Judge.MEASURES.items()):
        value = clean[m] - found[m] if change == "fall" else found[m] - clean[m]
        variables[name] = measurement(value, dims, long_name=f"{change} of {long_name}", units=units, source=source,
                                      definition=definition, coords=coords)
        variables[f"clean_{name}"] = measurement(clean[m], ("example",), long_name=long_name, units=units,
                                                 definition="of the run as it is", source="the model's own answer")
    return xr.Dataset(variables, attrs={"n_loops": n_loops, "definition": definition, "source": source})
