"""What a lens reads at every depth of one forward, layer by layer and loop by loop.

Second stop of the way hooks → probes → studies → app. Any lens of `probes.lenses` turns the states of one forward into
distributions over tokens; `probes.lenses.readouts` says what these do from loop to loop.

    lens = read_lens(model, noised, n_loops=8, kind="coda", targets=tokens)
    lens.nll.sel(depth=lens.loop == 3).where(lens.scored).mean(("batch", "pos"))   # nats, per layer of loop 3
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Forward, Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.lenses.base import CodaLens, Lens, LogitLens, divergence
from probes.measurement import check_run, depth_coords, measurement

LensKind = Literal["logit", "coda"]

LENSES: dict[LensKind, Lens] = {"logit": LogitLens(), "coda": CodaLens()}
"""The lenses that need no fitting."""

CHUNK_ELEMENTS = 2 ** 23
"""Elements of the widest activation that one call of the tail may hold (32 MB in float32)."""

_VALUES: dict[str, tuple[str, str, str]] = {
    "prediction": ("most probable token", "1", "argmax of the lens's distribution p"),
    "probability": ("probability of the prediction", "probability", "max p"),
    "entropy": ("entropy of the lens", "nat", "−Σ p log p"),
    "kl_to_final": ("divergence from the final answer", "nat", "KL(p_final ‖ p) = Σ p_final (log p_final − log p)"),
    "nll": ("negative log-likelihood of the target", "nat", "−log p(target)"),
    "target_probability": ("probability of the target", "probability", "p(target)"),
    "target_rank": ("rank of the target", "1", "tokens more probable than the target, ties count half"),
    "margin": ("margin of the target", "nat", "logit of the target − the largest other logit"),
    "top_tokens": ("most probable tokens", "1", "tokens by falling p"),
    "top_probabilities": ("probabilities of the most probable tokens", "probability", "p by falling p"),
}


@torch.no_grad()
def read_lens(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, kind: LensKind | Lens = "logit",
              targets: Int[Tensor, "batch pos"] | None = None, t: Levels = None, top_k: int = 1,
              final: Float[Tensor, "batch pos vocab"] | None = None) -> xr.Dataset:
    """What a lens reads at every depth of one forward, over (depth, batch, pos).

    ``kind`` is "logit", "coda", or a fitted lens (`TunedLens`, `JacobianLens`, `RecalibratedLens`).

    ``prediction`` (token id), its ``probability``, ``entropy`` [nat] and ``kl_to_final`` [nat]; with ``targets``
    (clean tokens, −1 where there is none; of a model that predicts the next token, by default the next token) also
    ``nll`` [nat], ``target_probability``, ``target_rank`` (0 for the most probable token; ties count half) and
    ``margin`` [nat] (logit of the target less the largest other one); with ``top_k`` > 1 also ``top_tokens`` and
    ``top_probabilities`` along ``rank``. ``final`` holds the logits that ``kl_to_final`` refers to, by default the
    model's own output in this run. The coordinate ``scored`` [batch, pos] says which positions have an answer (the
    masked ones of a masked model).

    The last depth is the model's own output; under the coda lens so are all depths from the last looped layer of
    the last loop on, and the last looped layer of loop k reads what the model answers with n_loops = k + 1.
    Definitions: logit lens, nostalgebraist 2020; coda lens, 2507.02199.

    Raises ValueError for an unknown lens, one that was fitted for another model or number of loops, a ``top_k`` beyond
    the vocabulary, targets that hold the mask, or a model whose states or answers are not finite.
    """
    lens = _lens(kind)
    with model.exclusive():
        run, asked = _run(model, inputs, n_loops, t, lens, targets, top_k, final)
        topology = run.context.topology
        own = lens.own_from(topology)                 # from here on nothing is left to compute
        parts = _read(model, lens, run, torch.stack(run.states[1:own + 1]), torch.arange(own), asked) if own else []
        parts += [asked.values(run.logits)] * (topology.depth - own)
    return _dataset(lens, parts, "depth", depth_coords(topology), asked, topology)


@torch.no_grad()
def read_line(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, kind: LensKind | Lens = "logit",
              targets: Int[Tensor, "batch pos"] | None = None, t: Levels = None, top_k: int = 1,
              final: Float[Tensor, "batch pos vocab"] | None = None) -> xr.Dataset:
    """What the lens reads on the straight line through the states after loops 0 and 1, over (loop, batch, pos).

    The null of every curve over loops: at loop k the state is h_0 + k (h_1 − h_0), which is the run's own at loops 0
    and 1. A lens that improves along the line as much as along the run shows how far the state moved, and no work of
    later loops. Values, arguments and errors are those of `read_lens`; ValueError also for fewer than two loops.
    """
    lens = _lens(kind)
    with model.exclusive():
        run, asked = _run(model, inputs, n_loops, t, lens, targets, top_k, final)
        topology = run.context.topology
        exits = [loop[-1] for loop in topology.loop_depths()]
        if len(exits) < 2:
            raise ValueError(f"a line goes through the states after two loops; {model.name} runs {len(exits)} here.")
        first, second = run.states[exits[0] + 1], run.states[exits[1] + 1]
        line = torch.stack([first + k * (second - first) for k in range(len(exits))])
        parts = _read(model, lens, run, line, torch.tensor(exits), asked)
    found = _dataset(lens, parts, "loop", {"loop": np.arange(len(exits))}, asked, topology)
    return found.assign_attrs(null="the straight line through the states after loops 0 and 1")


# -------------------------------------------------------------------------------------- private

class _Asked(NamedTuple):
    """What a lens's answers are compared with."""

    final_log: Float[Tensor, "batch pos vocab"]
    targets: Int[Tensor, "batch pos"] | None
    scored: Bool[Tensor, "batch pos"]
    top_k: int

    def values(self, logits: Float[Tensor, "row pos vocab"], example: Int[Tensor, "row"] | None = None,
               ) -> dict[str, Tensor]:
        """What answers say, given whose they are (by default one per example)."""
        chosen: Any = slice(None) if example is None else example
        targets = None if self.targets is None else self.targets[chosen]
        return _values(logits, self.final_log[chosen], targets, self.top_k)


def _lens(kind: LensKind | Lens) -> Lens:
    lens = kind if isinstance(kind, Lens) else LENSES.get(kind)
    if lens is None:
        raise ValueError(f"kind must be one of {', '.join(LENSES)}, or a fitted lens, not {kind!r}.")
    return lens


def _run(model: LoopedModel, inputs: Inputs, n_loops: int | None, t: Levels, lens: Lens, targets: Tensor | None,
         top_k: int, final: Tensor | None) -> tuple[Forward, _Asked]:
    """The forward, checked, and what is asked of it."""
    scored = model.scored(inputs)
    targets = model.targets(inputs) if targets is None else targets
    lens.check(model, model.topology(n_loops))
    run = model.run(inputs, n_loops, t=t)
    check_run(run)
    _check(model, run.logits, targets, top_k, final)
    final_log = (run.logits if final is None else final).float().log_softmax(-1)
    return run, _Asked(final_log, None if targets is None else targets.to(final_log.device), scored, top_k)


def _read(model: LoopedModel, lens: Lens, run: Forward, states: Float[Tensor, "place batch pos d_model"],
          depths: Int[Tensor, "place"], asked: _Asked) -> list[dict[str, Tensor]]:
    """What the lens reads from states, each the state after the layer at its depth; in chunks of rows."""
    _, batch, pos, vocab = len(states), *run.logits.shape
    flat, depths = states.flatten(0, 1), depths.to(states.device)
    widest, parts = pos * max(vocab, 8 * flat.shape[-1]), []
    for rows in torch.arange(len(flat), device=flat.device).split(max(1, CHUNK_ELEMENTS // widest)):
        example = rows % batch
        logits = lens.logits(model, flat[rows], run.context.rows(example), depths[rows // batch])
        parts.append(asked.values(logits, example.to(logits.device)))
    return parts


def _dataset(lens: Lens, parts: list[dict[str, Tensor]], axis: str, coords: dict[Hashable, Any], asked: _Asked,
             topology: Topology) -> xr.Dataset:
    """The values along ``axis``, labelled."""
    batch = len(asked.scored)
    coords = {**coords, "scored": (("batch", "pos"), asked.scored.cpu().numpy())}
    variables = {}
    for name, (long_name, units, formula) in _VALUES.items():
        if name in parts[0]:
            value = torch.cat([part[name] for part in parts]).unflatten(0, (-1, batch))
            dims = (axis, "batch", "pos") + (("rank",) if name.startswith("top_") else ())
            variables[name] = measurement(value, dims, long_name=f"{long_name} ({lens.kind} lens)", units=units,
                                          definition=f"{formula}; {lens.definition}", source=lens.source, coords=coords)
    return xr.Dataset(variables, attrs={"kind": lens.kind, "n_loops": topology.n_loops, "definition": lens.definition,
                                        "source": lens.source})


def _values(logits: Float[Tensor, "row pos vocab"], final_log: Float[Tensor, "row pos vocab"],
            targets: Int[Tensor, "row pos"] | None, top_k: int) -> dict[str, Tensor]:
    """What a distribution says, each [row, pos]; an answer that is ruled out adds nothing to a sum."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    top_probabilities, top_tokens = p.topk(top_k, dim=-1)
    values = {"prediction": top_tokens[..., 0], "probability": top_probabilities[..., 0],
              "entropy": torch.special.entr(p).sum(-1), "kl_to_final": divergence(final_log, log_p)}
    if targets is not None:
        truth = targets.clamp_min(0)[..., None].long()
        there = log_p.gather(-1, truth)
        rank = (log_p > there).sum(-1) + ((log_p == there).sum(-1) - 1) / 2
        margin = there[..., 0] - log_p.scatter(-1, truth, -torch.inf).amax(-1)
        of_target = {"nll": -there[..., 0], "target_probability": there[..., 0].exp(), "target_rank": rank,
                     "margin": margin}
        values |= {name: value.masked_fill(targets < 0, torch.nan) for name, value in of_target.items()}
    if top_k > 1:
        values |= {"top_tokens": top_tokens, "top_probabilities": top_probabilities}
    return values


def _check(model: LoopedModel, logits: Tensor, targets: Tensor | None, top_k: int, final: Tensor | None) -> None:
    vocab = logits.shape[-1]
    if not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be between 1 and the vocabulary's {vocab}, not {top_k}.")
    if targets is not None:
        if targets.shape != logits.shape[:2]:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, the answer is [batch, pos] = "
                             f"{tuple(logits.shape[:2])}.")
        if not bool((targets >= 0).any()) or bool(((targets < -1) | (targets >= vocab)).any()) or (
                model.mask_token_id is not None and bool((targets == model.mask_token_id).any())):
            raise ValueError(f"targets must be clean tokens: ids in 0..{vocab - 1} other than the mask "
                             f"({model.mask_token_id}), and −1 where there is none. Pass the sequence as it was before "
                             "masking.")
    if final is not None and final.shape != logits.shape:
        raise ValueError(f"final must hold logits [batch, pos, vocab] = {tuple(logits.shape)}, "
                         f"not {tuple(final.shape)}.")
