"""Lenses: what the model would answer from the residual stream, layer by layer and loop by loop.

Second stop of the way hooks → probes → studies → app. A lens turns the state after a layer
into a distribution over tokens. The **logit lens** reads it directly, unembed(X); the **coda
lens** first runs the layers after the loop on it: "what if looping stopped here". One recorded
forward serves every depth.

    lens = read_lens(model, noised, n_loops=8, kind="coda", targets=tokens)
    lens.nll.sel(depth=lens.loop == 3).where(lens.scored).mean(("batch", "pos"))   # nats, per layer of loop 3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.measurement import check_finite, depth_coords, measurement

LensKind = Literal["logit", "coda"]

LENSES: dict[LensKind, tuple[str, str]] = {
    "logit": ("logits = unembed(ln_final(X)) at each depth", "nostalgebraist 2020, interpreting GPT: the logit lens"),
    "coda": ("logits = tail(X), all of the tail, for states of head and loops; for a state inside the tail, "
             "the layers that remain, which give the model's own output", "arXiv 2507.02199"),
}
"""Definition and source of each lens."""

CHUNK_ELEMENTS = 2 ** 23
"""Elements of the widest activation that one call of the tail may hold (32 MB in float32)."""

_VALUES: dict[str, tuple[str, str, str]] = {
    "prediction": ("most probable token", "1", "argmax of the lens's distribution p"),
    "probability": ("probability of the prediction", "probability", "max p"),
    "entropy": ("entropy of the lens", "nat", "−Σ p log p"),
    "kl_to_final": ("divergence from the final answer", "nat", "KL(p_final ‖ p) = Σ p_final (log p_final − log p)"),
    "nll": ("negative log-likelihood of the target", "nat", "−log p(target)"),
    "target_probability": ("probability of the target", "probability", "p(target)"),
    "top_tokens": ("most probable tokens", "1", "tokens by falling p"),
    "top_probabilities": ("probabilities of the most probable tokens", "probability", "p by falling p"),
}


@torch.no_grad()
def read_lens(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, kind: LensKind = "logit",
              targets: Int[Tensor, "batch pos"] | None = None, t: Levels = None,
              top_k: int = 1, final: Float[Tensor, "batch pos vocab"] | None = None) -> xr.Dataset:
    """What a lens reads at every depth of one forward, over (depth, batch, pos).

    ``prediction`` (token id), its ``probability``, ``entropy`` [nat] and ``kl_to_final`` [nat]; with ``targets``
    (clean tokens, −1 where there is none; of a model that predicts the next token, by default the next token) also
    ``nll`` [nat] and ``target_probability``; with ``top_k`` > 1 also ``top_tokens`` and ``top_probabilities`` along
    ``rank``. ``final`` holds the logits that ``kl_to_final`` refers to, by default the model's own output in this
    run. The coordinate ``scored`` [batch, pos] says which positions have an answer (the masked ones of a masked model).

    The last depth is the model's own output; under the coda lens so are all depths from the last looped layer of
    the last loop on, and the last looped layer of loop k reads what the model answers with n_loops = k + 1.
    Definitions: logit lens, nostalgebraist 2020; coda lens, 2507.02199.

    Raises ValueError for an unknown lens, a ``top_k`` beyond the vocabulary, targets that hold the mask, or a model
    whose states or answers are not finite.
    """
    if kind not in get_args(LensKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(LensKind))}, not {kind!r}.")
    with model.exclusive():
        scored = model.scored(inputs)
        targets = model.targets(inputs) if targets is None else targets
        states, logits, context = model.run(inputs, n_loops, t=t)
        topology = context.topology
        for state in states:
            check_finite(state, "the residual stream")
        check_finite(logits, "the model's answer", ruled_out=True)
        _check(model, logits, targets, top_k, final)
        # From here on the lens is the model's own output by definition: nothing is left to compute.
        own = topology.depth - 1 if kind == "logit" else topology.n_head + topology.n_loops * topology.n_mid - 1
        final_log = (logits if final is None else final).float().log_softmax(-1)
        batch, pos, vocab = logits.shape

        def read(answer: Tensor, rows: Tensor) -> dict[str, Tensor]:
            return _values(answer, final_log[rows], None if targets is None else targets[rows], top_k)

        everyone = torch.arange(batch, device=logits.device)
        parts = []
        if own:
            stacked = torch.stack(states[1:own + 1]).flatten(0, 1)
            lens: Callable[..., Tensor] = model.read if kind == "logit" else model.coda
            widest = pos * max(vocab, 8 * stacked.shape[-1])
            for rows in torch.arange(len(stacked), device=logits.device).split(max(1, CHUNK_ELEMENTS // widest)):
                example = rows % batch
                parts.append(read(lens(stacked[rows], context.rows(example)), example))
        parts += [read(logits, everyone)] * (topology.depth - own)
    definition, source = LENSES[kind]
    coords = {**depth_coords(topology), "scored": (("batch", "pos"), scored.cpu().numpy())}
    variables = {}
    for name, (long_name, units, formula) in _VALUES.items():
        if name in parts[0]:
            value = torch.cat([part[name] for part in parts]).unflatten(0, (topology.depth, batch))
            dims = ("depth", "batch", "pos") + (("rank",) if name.startswith("top_") else ())
            variables[name] = measurement(value, dims, long_name=f"{long_name} ({kind} lens)", units=units,
                                          definition=f"{formula}; {definition}", source=source, coords=coords)
    return xr.Dataset(variables, attrs={"kind": kind, "n_loops": topology.n_loops, "definition": definition,
                                        "source": source})


def _values(logits: Float[Tensor, "row pos vocab"], final_log: Float[Tensor, "row pos vocab"],
            targets: Int[Tensor, "row pos"] | None, top_k: int) -> dict[str, Tensor]:
    """What a distribution says, each [row, pos]; the mask's probability is an exact 0 and adds nothing to a sum."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    top_probabilities, top_tokens = p.topk(top_k, dim=-1)
    values = {"prediction": top_tokens[..., 0], "probability": top_probabilities[..., 0],
              "entropy": -(p * log_p).sum(-1), "kl_to_final": (final_log.exp() * (final_log - log_p)).sum(-1)}
    if targets is not None:
        nll = -log_p.gather(-1, targets.clamp_min(0)[..., None].long())[..., 0]
        values["nll"] = nll.masked_fill(targets < 0, torch.nan)
        values["target_probability"] = (-values["nll"]).exp()
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
