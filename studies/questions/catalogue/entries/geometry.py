"""Geometry of the catalogue: how states move from loop to loop, and what shape they have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from probes import (
    basins,
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    intrinsic_dimension,
    jacobian_spectrum,
    line_search,
    lyapunov,
    matrix_entropy,
    measurement,
    periods,
    trajectory_pca,
)
from probes.geometry import TOKEN_CLASSES
from studies.questions.catalogue.entries.entry import (
    CatalogueEntry,
    averaged,
    example_mean,
    quantities,
    with_interval,
    without_examples,
)
from studies.questions.catalogue.entries.setting import Setting

FEW = 4
"""Examples whose loops are differentiated."""
ITERATIONS = 24
"""Steps of power iteration."""
LONG = 8
"""Loops in which cycles are looked for, at least."""
FAR = 4
"""Times as many loops as usual lead to what is taken for the fixed point."""

LINE = "the straight line through the states of loops 0 and 1"


def _longer(setting: Setting) -> Setting:
    """The same with enough loops to see cycles."""
    return setting if setting.run.context.topology.n_loops >= LONG else replace(setting, n_loops=LONG)


def _of_example(setting: Setting, values: xr.DataArray) -> xr.DataArray:
    """Means over the scored positions of each example."""
    scored = xr.DataArray(setting.scored.cpu().numpy(), dims=("batch", "pos"))
    return averaged(values.where(scored), ["pos"]).rename(batch="example")


def _norm(residual: xr.DataArray) -> xr.DataArray:
    size = (residual ** 2).sum("d_model") ** 0.5
    return size.assign_attrs(long_name="norm of the state", units="residual stream", definition="‖X‖",
                             source="2510.06477")


def _norms(setting: Setting) -> xr.Dataset:
    looped = setting.run.context.topology.n_loops > 1
    line = _of_example(setting, _norm(setting.line)) if looped else None
    found = example_mean(_of_example(setting, _norm(setting.residual)), null=line)
    if line is not None:
        found["null"] = found.null.where(setting.residual.loop >= 0)
    return found


def _moves(setting: Setting, name: str) -> xr.Dataset:
    topology = setting.run.context.topology
    own, line = (_of_example(setting, dynamics(residual, topology)[name].isel(layer=-1, drop=True))
                 for residual in (setting.residual, setting.line))
    return example_mean(own, null=line)


def _steps(setting: Setting) -> xr.Dataset:
    return _moves(setting, "step_relative")


def _turns(setting: Setting) -> xr.Dataset:
    return _moves(setting, "step_cosine")


def _distance(setting: Setting, residual: xr.DataArray) -> xr.DataArray:
    topology = setting.run.context.topology
    few = fixed_point(setting.model, setting.inputs, n_loops=FAR * topology.n_loops, t=setting.t)
    return dynamics(residual, topology, fixed_point=few).distance_to_fixed_point.isel(layer=-1, drop=True)


def _arrival(setting: Setting) -> xr.Dataset:
    own, line = (_of_example(setting, _distance(setting, residual)) for residual in (setting.residual, setting.line))
    return example_mean(own, null=line)


def _laws(setting: Setting) -> xr.Dataset:
    parts = []
    for residual in (setting.residual, setting.line):
        found = contraction(_distance(setting, residual))
        factor = np.exp(found.exponential)
        parts.append(quantities({name: _of_example(setting, part) for name, part in (
            ("factor per loop", factor), ("R² of an exponential", found.exponential_r2),
            ("R² of a power law", found.power_r2))}))
    own = parts[0].assign_attrs(long_name="fit of the distance to the far state", units="1")
    return example_mean(own, null=parts[1])


def _classes(setting: Setting) -> xr.Dataset:
    long = _longer(setting)
    topology, parts = long.run.context.topology, []
    for residual in (long.residual, long.line):
        classes = classify_tokens(residual, topology).token_class.isel(layer=-1, drop=True)
        parts.append(quantities({name.replace("_", " "): _of_example(setting, (classes == number).astype(float))
                                 for number, name in enumerate(TOKEN_CLASSES)}))
    return example_mean(parts[0].assign_attrs(long_name="share of positions", units="1"), null=parts[1])


def _rank(setting: Setting) -> xr.Dataset:
    return without_examples(effective_rank, setting.residual, setting.seed)


def _entropy(setting: Setting) -> xr.Dataset:
    return without_examples(matrix_entropy, setting.residual, setting.seed)


def _dimension(setting: Setting) -> xr.Dataset:
    found = intrinsic_dimension(setting.residual, seed=setting.seed)
    return with_interval(found.value, found.low, found.high)


def _pca(setting: Setting) -> xr.Dataset:
    n = min(8, setting.residual.sizes["d_model"])
    return without_examples(lambda residual: trajectory_pca(residual, n).explained_variance_ratio, setting.residual,
                            setting.seed)


def _periods(setting: Setting) -> xr.Dataset:
    long = _longer(setting)
    found = periods(long.residual, long.run.context.topology)
    own, chance = (_of_example(setting, part) for part in (found.power, found.chance_power))
    return example_mean(own, null=chance)


def _jacobian(setting: Setting) -> xr.Dataset:
    few = setting.first(FEW)
    found = jacobian_spectrum(few.model, few.inputs, n_loops=few.n_loops, t=few.t, n_iter=ITERATIONS, seed=few.seed)
    return example_mean(quantities({"norm": found.norm, "spectral radius": found.radius}).assign_attrs(
        found.norm.attrs, long_name="norm and spectral radius of a loop's Jacobian"))


def _lyapunov(setting: Setting) -> xr.Dataset:
    few = setting.first(FEW)
    return example_mean(lyapunov(few.model, few.inputs, n_loops=few.n_loops, t=few.t, n_exponents=2,
                               n_iter=ITERATIONS // 2, seed=few.seed).exponent)


def _search(setting: Setting) -> xr.Dataset:
    return example_mean(line_search(setting.model, setting.inputs, targets=setting.targets, n_loops=setting.n_loops,
                                  t=setting.t, scored=setting.scored).nll)


def _basins(setting: Setting) -> xr.Dataset:
    found = basins(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t, scored=setting.scored,
                   seed=setting.seed)
    topology, states = setting.run.context.topology, setting.run.states
    ends = [states[topology.n_head], *(states[depths[-1] + 1] for depths in topology.loop_depths())]
    norms = torch.stack([state.detach().norm(dim=-1) for state in ends])                      # [entry and loops, …]
    kept: Any = (norms[0] / norms[1:].clamp_min(1e-30)).mean(-1)                              # [loop, example]
    null = found["size"] * measurement(kept, ("loop", "example"), long_name="", units="1", definition="", source="")
    return example_mean(averaged(found.distance, ["start"]), null=null.transpose("size", "loop", "example"))


GEOMETRY = (
    CatalogueEntry("norm", "Norm", "Geometry", "‖X‖", "0 and above", "How much has been added to the stream.",
        "Layers see the state normalised: growth alone changes little but the size of later updates beside it.",
        "2510.06477", _norms, LINE),
    CatalogueEntry("step", "Relative step", "Geometry", "‖X_k − X_(k−1)‖ ÷ ‖X_(k−1)‖", "0 and above",
        "How far a loop moves the state.",
        "It falls as 1 ÷ k when every loop adds the same vector: that is no fixed point.", "2509.23314", _steps, LINE,
        loops=2),
    CatalogueEntry("turn", "Turning", "Geometry", "cos(X_k − X_(k−1), X_(k−1) − X_(k−2))", "−1 to 1",
        "Whether a loop goes on as the one before did.",
        "1 on a straight line; in many dimensions unrelated steps have about 0.", "2509.23314", _turns, LINE, loops=2),
    CatalogueEntry("far_state", "Distance to the far state", "Geometry",
        f"‖X_k − X*‖ ÷ ‖X*‖, X* the state after {FAR} times as many loops", "0 and above",
        "Whether the loop has arrived where it is going.",
        "X* is a fixed point only if the state stays there, which a state that grows does not. An untrained "
        "model and a straight line come nearer in the same way.", "2604.11791", _arrival, LINE, loops=2),
    CatalogueEntry("contraction", "Law of contraction", "Geometry",
        "least squares of log distance against k (exponential) and against log(k + 1) (power law)",
        "factor 0 and above, R² up to 1", "Whether a distance falls by a factor per loop, or as 1 ÷ k.",
        "Few loops tell the two laws apart badly: an untrained model and a straight line fit both; a factor "
        "means something only where the exponential fits better.", "2604.11791", _laws, LINE, loops=2),
    CatalogueEntry("token_classes", "Settled, cyclic, drifting", "Geometry",
        f"by cos(X_k, X*) and cos(X_k, X_(k−p)) over the last of {LONG} loops or more", "0 to 1",
        "What share of positions comes to rest, turns in a cycle, or drifts.",
        "A settled direction is no fixed point: the state may grow along it.", "2604.11791", _classes, LINE, loops=2),
    CatalogueEntry("effective_rank", "Effective rank", "Geometry",
        "exp(−Σ p_i log p_i), p_i = σ_i ÷ Σσ, of the matrix of all states", "1 to d_model",
        "In how many directions states differ.",
        "Not centred: a large common mean looks like one dimension. Grows with the number of states.",
        "Roy & Vetterli 2007", _rank),
    CatalogueEntry("matrix_entropy", "Matrix entropy", "Geometry", "−Σ p_i log p_i, p_i = σ_i² ÷ Σσ²",
        "0 to log(d_model), nat", "The same, with more weight on large directions.", "As the effective rank.",
        "2510.06477", _entropy),
    CatalogueEntry("intrinsic_dimension", "Intrinsic dimension", "Geometry",
        "N ÷ Σ log(r₂ ÷ r₁), distances to the two nearest states", "0 and above",
        "The dimension of the surface that states lie on, curved or not.",
        "Falls short where the dimension is high and states are few: compare depths, not models of different size.",
        "TwoNN, Facco et al. 2017", _dimension),
    CatalogueEntry("trajectory_pca", "Principal components", "Geometry",
        "explained variance of the components of all states of all depths", "0 to 1", "How flat the trajectories are.",
        "Variance between depths and between positions are together: a growing norm is a component.", "Pearson 1901",
        _pca),
    CatalogueEntry("periods", "Cycles", "Geometry",
        f"share of the spectrum, less its straight line, at the strongest period over {LONG} loops or more", "0 to 1",
        "Whether states turn in a cycle.",
        "Any drift has a peak somewhere: compare with the same steps in random order.", "Schuster 1898", _periods,
        "the same steps in random order", loops=2),
    CatalogueEntry("jacobian", "Jacobian of a loop", "Geometry",
        "largest singular value (norm) and largest |eigenvalue| (radius) of ∂X_(k+1) ÷ ∂X_k", "0 and above",
        "Whether a loop shrinks differences in one pass (norm < 1), or if it were repeated there for ever "
        "(radius < 1).",
        "The radius bounds what a run does only at a fixed point; the norm may exceed 1 in a loop that "
        "contracts in the long run.", "Golub & Van Loan 2013, power iteration", _jacobian),
    CatalogueEntry("lyapunov", "Lyapunov exponents", "Geometry", "log σ_i(∂X_K ÷ ∂X_0) ÷ K", "any, nat per loop",
        "Whether small differences grow over the whole run (above 0) or shrink.",
        "Of finite time: growth first and shrinking later give their balance.", "Oseledets 1968; Eckmann & Ruelle 1985",
        _lyapunov),
    CatalogueEntry("line_search", "Line search", "Geometry", "NLL of the coda's answer at X_k + α (X_(k+1) − X_k)",
        "0 and above, nat", "Whether a loop's step has the right length: the least NLL is at α = 1 where it has.",
        "The best of several α is never worse than α = 1, by chance alone.", "2609.16665", _search),
    CatalogueEntry("basins", "Perturbed starts", "Geometry",
        "‖X'_k − X_k‖ ÷ ‖X_k‖, X'_0 = X_0 + size · ‖X_0‖ · random direction", "0 and above",
        "Whether the loop forgets where it began.",
        "It falls where the norm grows, too: compare with a stream that only adds up.", "2609.04963", _basins,
        "a stream that adds the same, whatever it starts from", loops=2),
)
