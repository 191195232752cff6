"""Compute: what the pages show, as labelled arrays from `probes`, cached.

Second of the three stages load → compute → draw. Every function is cached under all that its
answer depends on: the checkpoint (file, device, dtype), the tokens and the settings. Tokens
travel as tuples, one per example, because those hash by value.

    lens = lens_of(scene.checkpoint, rows(scene.noised), rows(scene.tokens), n_loops=8, t=1.0, kind="coda")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import streamlit as st
import torch
import xarray as xr
from torch import Tensor

from app.data import Checkpoint, load_entry
from hooks import HookedLoopMDM
from hooks.model.diffusion import DenoisingStep, SamplerConfig
from hooks.model.sampling import record_sampling
from hooks.recording import Recording
from hooks.reducers import ChangeFromPrevious
from hooks.sites import split
from probes.attention import attention_summary, patterns
from probes.geometry import classify_tokens, contraction, dynamics, fixed_point, trajectory_pca
from probes.lenses import LensKind, read_lens
from probes.linear import probe_latent
from probes.measurement import depth_coords, measurement

FIXED_POINT_LOOPS = 128
"""Loops after which the state is taken as the fixed point."""

Rows = tuple[tuple[int, ...], ...]
"""Token ids, one tuple per example."""


def rows(tokens: Tensor) -> Rows:
    """Tokens [pos] or [example, pos] in a form that a cache can key on."""
    return tuple(map(tuple, torch.atleast_2d(tokens).tolist()))


@st.cache_data(max_entries=64, show_spinner=False)
def lens_of(checkpoint: Checkpoint, noised: Rows, tokens: Rows, n_loops: int, t: float, kind: LensKind) -> xr.Dataset:
    """`read_lens` with the three most probable tokens, fewer in a smaller vocabulary."""
    model, noised_tokens = _ready(checkpoint, noised)
    top_k = min(3, model.config.vocab_size - 1)
    return read_lens(model, noised_tokens, n_loops=n_loops, kind=kind, targets=torch.tensor(tokens).to(noised_tokens),
                     t=t, top_k=top_k)


@st.cache_data(max_entries=64, show_spinner=False)
def movement(checkpoint: Checkpoint, noised: Rows, n_loops: int, t: float, unit: bool) -> tuple[xr.Dataset, xr.Dataset]:
    """(step sizes, angles, distance to the fixed point; PCA trajectories of the same states).

    With ``unit``, of states scaled to norm 1, X / ‖X‖: what changes there is direction alone. ``norm`` holds ‖X‖.
    """
    model, tokens = _ready(checkpoint, noised)
    _, rec = model.run_with_cache(tokens, n_loops, names_filter="blocks.*.hook_resid_post", t=t)
    residual = rec.residual_stream()
    topology = model.config.topology(n_loops)
    target = _settled(checkpoint, noised, t)
    norm = _norm(residual)
    if unit:
        residual, target = residual / norm, target / _norm(target)
    moves = dynamics(residual, topology, fixed_point=target)
    moves["last_step"] = measurement(target.last_step.values, ("layer", "batch", "pos"), units="1",
                                     long_name="relative step size at the fixed point",
                                     definition=f"‖X_k − X_(k−1)‖ / ‖X_(k−1)‖ at loop {FIXED_POINT_LOOPS - 1}, states "
                                                "as they are", source="arXiv 2509.23314")
    for name in moves.data_vars if unit else ():
        moves[name].attrs["definition"] += ", of states scaled to norm 1"
    moves["norm"] = measurement(norm.values, ("depth", "batch", "pos"), long_name="size of the state", units="1",
                                definition="‖X‖", source="arXiv 2510.06477", coords=depth_coords(topology))
    moves["masked"] = (("batch", "pos"), (tokens == model.config.mask_token_id).cpu().numpy())
    return moves, trajectory_pca(residual, n_components=3)[["coordinates", "explained_variance_ratio"]]


@st.cache_data(max_entries=32, show_spinner="Looping until the states settle …")
def token_classes(checkpoint: Checkpoint, noised: Rows, t: float, n_loops: int = 32) -> xr.Dataset:
    """Settled (state, or direction only), cyclic or drifting, judged over more loops than are shown elsewhere; and
    `contraction` of the direction's distance to that of the state after many loops, over the same loops."""
    model, tokens = _ready(checkpoint, noised)
    _, rec = model.run_with_cache(tokens, n_loops, names_filter="blocks.*.hook_resid_post", t=t)
    residual, topology, target = rec.residual_stream(), model.config.topology(n_loops), _settled(checkpoint, noised, t)
    moves = dynamics(residual / _norm(residual), topology, fixed_point=target / _norm(target))
    return classify_tokens(residual, topology, fixed_point=target).merge(contraction(moves.distance_to_fixed_point))


@st.cache_data(max_entries=32, show_spinner=False)
def _settled(checkpoint: Checkpoint, noised: Rows, t: float) -> xr.DataArray:
    """The state after many loops, which every number of loops shown is compared with."""
    model, tokens = _ready(checkpoint, noised)
    return fixed_point(model, tokens, n_loops=FIXED_POINT_LOOPS, t=t)


@st.cache_data(max_entries=32, show_spinner=False)
def patterns_of(checkpoint: Checkpoint, noised: Rows, n_loops: int, t: float) -> xr.DataArray:
    """Attention patterns of one example at every depth."""
    model, tokens = _ready(checkpoint, noised)
    return patterns(model, tokens, n_loops=n_loops, t=t).isel(batch=0)


@st.cache_data(max_entries=64, show_spinner="Summing up attention …")
def attention_of(checkpoint: Checkpoint, noised: Rows, n_loops: int, t: float) -> xr.Dataset:
    """`attention_summary` over examples."""
    model, tokens = _ready(checkpoint, noised)
    return attention_summary(model, tokens, n_loops=n_loops, t=t)


@st.cache_data(max_entries=32, show_spinner="Fitting a linear probe at every (loop, layer) and region …")
def probes_of(checkpoint: Checkpoint, noised: Rows, tokens: Rows, n_loops: int, t: float, latent: str,
              seed: int = 0) -> xr.Dataset:
    """`probe_latent` for one latent of the task, a probe per (depth, region)."""
    model, noised_tokens = _ready(checkpoint, noised)
    task = load_entry(checkpoint).task
    wanted = task.latents(torch.tensor(tokens))[latent]
    defined = (wanted.values >= 0).any(0)
    groups = task.regions().masked_fill(~defined, -1)   # a region without the latent gets no probe
    return probe_latent(model, noised_tokens, wanted.values, wanted.n_classes, n_loops=n_loops, t=t,
                        groups=groups, seed=seed)


@st.cache_data(max_entries=64, show_spinner="Denoising …")
def trace_of(checkpoint: Checkpoint, noised: Rows, config: dict[str, Any], seed: int) -> list[dict[str, np.ndarray]]:
    """The sampler's trace, a dictionary of arrays per step (see `DenoisingStep`); config: SamplerConfig's fields.

    ``change`` [loop]: how far each loop of the step moved the state after the looped layers, ‖X_k − X_(k−1)‖ /
    ‖X_(k−1)‖ averaged over the positions that were still masked; NaN in the first loop.
    """
    model, tokens = _ready(checkpoint, noised)
    after_loops, _ = split(model.site(model.topology(1).loop_depths()[0][-1], n_loops=1))
    trace: list[dict[str, np.ndarray]] = []

    def keep(step: DenoisingStep, rec: Recording) -> None:
        masked = (step.before == model.mask_token_id).float()
        change = rec.stack(after_loops)                          # [loop, batch, pos]
        trace.append({**_plain(step), "change": ((change * masked).sum((1, 2)) / masked.sum()).cpu().numpy()})

    record_sampling(model, tokens, SamplerConfig(**config), keep, names_filter=f"{after_loops}@*",
                    reduce=ChangeFromPrevious(), generator=torch.Generator(device=tokens.device).manual_seed(seed))
    return trace


def _norm(states: xr.DataArray) -> xr.DataArray:
    """‖X‖ over d_model."""
    return (states ** 2).sum("d_model") ** 0.5


def _plain(step: DenoisingStep) -> dict[str, np.ndarray]:
    fields = {name: getattr(step, name).cpu().numpy()
              for name in ("before", "after", "predicted", "probability", "loops_used", "revealed")}
    return {**fields, "step": np.asarray(step.step), "t": np.asarray(step.t)}


def _ready(checkpoint: Checkpoint, tokens: Sequence[Sequence[int]]) -> tuple[HookedLoopMDM, Tensor]:
    model = load_entry(checkpoint).model
    return model, torch.tensor(tokens, device=next(model.parameters()).device)
