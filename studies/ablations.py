"""What decides whether the state's direction settles? One change of the LoopMDM at a time, measured alike.

    python studies/pretrain.py --preset ablation-injection   # and the other ablation-* presets, all listed by --list
    python studies/ablations.py                              # writes results/ablations-automaton/ and ablations.md
    python studies/ablations.py --render                     # words, table and pages again, from what was measured

Blayney et al. (2604.11791) report that in looped language models each layer of the cycle tends to its own fixed
point, and that block size, input injection and normalisation decide whether it does. Every variant here was trained
on the same task for the same FLOPs; `studies.presets.ABLATIONS` says what each changes. Seeds of a variant are
averaged, and the seeds of the base say how much chance alone moves a number. Where the norm of the state grows on,
there is no fixed point; then "converged" is said of the state's direction.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from probes.geometry import classify_tokens, dynamics, fixed_point
from probes.measurement import measurement
from probes.stages import Cycle, head_distances, loop_cycle, pattern_gram
from studies.ablations_report import figures, page, report, words
from studies.checks import at_least
from studies.claims_measure import loop_counts, looped
from studies.results import RESULTS, provenance, read_results, write_results
from studies.zoo import ZOO, Entry, load, names, read_card

SETTLED = 128
"""Loops after which the state is taken as the fixed point."""

MEASURES: dict[str, tuple[str, str]] = {
    "exact": ("examples right at S_max", "every free position masked, one forward of S_max loops"),
    "exact_more": ("examples right at 2 · S_max", "the same with twice the loops of training"),
    "cells_once": ("cells right at S = 1", "share of free positions right after one loop"),
    "converged": ("share of states whose direction settles", "cos(X_k, X*) ≥ 0.99 in the last 3 of 32 loops, X* after "
                  "128"),
    "cyclic": ("share of states whose direction cycles", "nearer, with cosine ≥ 0.99, to the state 2 to 4 loops ago "
               "than to the last"),
    "step_cosine": ("cosine of successive steps", "median of cos(Δ_k, Δ_(k−1)) over loops 3 to S_max"),
    "norm_growth": ("growth of the state", "median of ‖X_32‖ / ‖X_8‖"),
    "attention_change": ("change of attention from loop to loop", "distance between a layer's patterns in loops k and "
                         "k − 1, at k = S_max ÷ the mean over all pairs of loops up to S_max"),
}
"""Key, name and definition of each number; states are those after the looped layers, at masked positions."""

UNDEFINED = {
    "step_cosine": "no state moves in two successive loops up to S_max",
    "attention_change": "attention is the same in all loops up to S_max",
}
"""Why a number may have no value; the others always have one."""


@dataclass(frozen=True)
class Ablations:
    """Compare the ablations of the zoo."""

    task: str = "automaton"
    """Task of the variants called ablation-*."""
    examples: int = 64
    """Held-out examples."""
    seed: int = 0
    """Of the examples."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""
    render: bool = False
    """Measure nothing: write words, table and pages again from the measurements that are there."""

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples)


def find(task: str, zoo: Path) -> dict[str, dict[int, Entry]]:
    """change → seed → entry, the base first."""
    found: dict[str, dict[int, Entry]] = {}
    for name in names(zoo):
        card = read_card(zoo / name)
        match = re.fullmatch(r"ablation-(.+?)(-s\d+)?", str(card.get("variant", "")))
        if match and card["task"]["name"] == task and card["kind"] == "loop":
            found.setdefault(match[1], {})[int(card["seed"])] = load(zoo / name)
    return dict(sorted(found.items(), key=lambda item: item[0] != "base"))


@torch.no_grad()
def measure(entry: Entry, *, examples: int, seed: int) -> tuple[dict[str, float], xr.Dataset]:
    """The numbers of `MEASURES`, and curves: accuracy over S, distance to the fixed point and step over loops."""
    model, task = entry.model, entry.task
    s_max = model.config.max_loops
    batch = task.sample(examples, seed=seed, split="test")
    noised = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    counts = loop_counts(s_max)
    scores = {s: task.score(logits.argmax(-1), batch)
              for s, logits, _ in looped(model, noised, torch.ones(examples), counts)}
    _, rec = model.run_with_cache(noised, 32, names_filter="blocks.*.hook_resid_post", t=1.0)
    residual, topology = rec.residual_stream(), model.config.topology(32)
    target = fixed_point(model, noised, n_loops=SETTLED, t=1.0)
    norm = _norm(residual)
    moves = dynamics(residual / norm, topology, fixed_point=target / _norm(target))
    masked = (noised == task.mask_token_id).numpy()
    classes = classify_tokens(residual, topology, fixed_point=target).token_class.values[:, masked]
    looped_norm = norm.values[topology.n_head:topology.n_head + 32 * topology.n_mid].reshape(32, -1, *masked.shape)
    numbers = {
        "exact": float(scores[s_max]["exact"].mean()), "exact_more": float(scores[2 * s_max]["exact"].mean()),
        "cells_once": float(scores[1]["cells"].mean()),
        "converged": float((classes == 2).mean()), "cyclic": float((classes == 1).mean()),
        "step_cosine": _median(moves.step_cosine.values[2:s_max][..., masked]),
        "norm_growth": float(np.median((looped_norm[31] / looped_norm[7])[:, masked])),
        "attention_change": attention_change(model, noised[:16])}
    return numbers, _curves(scores, moves, masked)


def attention_change(model: HookedLoopMDM, noised: torch.Tensor) -> float:
    """How far attention of the same layer still moves in the last loop of training, relative to all pairs of loops."""
    cycle: Cycle = loop_cycle(model.config, model.config.max_loops)
    distance = head_distances(pattern_gram(model, noised, cycle, t=1.0)).mean("example").values
    by_layer = distance.reshape(cycle.n_loops, cycle.n_layers, cycle.n_loops, cycle.n_layers)
    same = np.stack([by_layer[:, layer, :, layer] for layer in range(cycle.n_layers)]).mean(0)   # [loop, loop]
    pairs = same[np.triu_indices(cycle.n_loops, k=1)]
    return float(same[-1, -2] / pairs.mean()) if pairs.any() else float("nan")   # NaN: attention never changes


def _curves(scores: dict[int, dict[str, torch.Tensor]], moves: xr.Dataset, masked: np.ndarray) -> xr.Dataset:
    def over_loops(values: xr.DataArray) -> np.ndarray:
        return np.array([_median(of_one_loop) for of_one_loop in values.values[..., masked]])

    loops: dict[Any, Any] = {"loop": np.arange(1, 33)}
    return xr.Dataset({
        "cells": measurement([float(s["cells"].mean()) for s in scores.values()], ("n_loops",), units="probability",
                             long_name="free cells right", definition="all masked, one forward", source="2605.26106",
                             coords={"n_loops": list(scores)}),
        "distance": measurement(over_loops(moves.distance_to_fixed_point), ("loop",), units="1", coords=loops,
                                long_name="distance to the fixed point", source="2604.11791",
                                definition=f"median of ‖X_k − X*‖ / ‖X*‖, states of norm 1, X* after {SETTLED} loops"),
        "step": measurement(over_loops(moves.step_norm), ("loop",), units="1", coords=loops,
                            long_name="step of the unit state", source="2509.23314",
                            definition="median of ‖X_k − X_(k−1)‖, states of norm 1")})


def _median(values: np.ndarray) -> float:
    """Of the values that are defined; NaN if none is."""
    defined = values[np.isfinite(values)]
    return float(np.median(defined)) if defined.size else float("nan")


def _norm(states: xr.DataArray) -> xr.DataArray:
    return (states ** 2).sum("d_model") ** 0.5


def main(args: Ablations) -> int:
    """Run the study; 2 if the zoo holds no ablations with a base, or nothing is there to be rendered."""
    if args.render:
        return render(args)
    began = time.monotonic()
    found = find(args.task, args.zoo)
    if "base" not in found or len(found) < 2:
        print(f"{args.zoo} holds no base and change called {args.task}-loop-ablation-*: train them with "
              "`python studies/pretrain.py --preset ablation-base` and the other ablation presets.", file=sys.stderr)
        return 2
    numbers: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, list[xr.Dataset]] = {}
    for change, seeds in tqdm(found.items(), desc="ablations", disable=None):
        for entry in seeds.values():
            torch.manual_seed(args.seed)
            row, drawn = measure(entry, examples=args.examples, seed=args.seed)
            numbers.setdefault(change, []).append(row)
            curves.setdefault(change, []).append(drawn)
    table = [{"change": change, "entries": [entry.name for entry in found[change].values()],
              "values": {key: [row[key] if np.isfinite(row[key]) else None for row in rows] for key in MEASURES}}
             for change, rows in numbers.items()]
    joined = xr.concat([xr.concat(parts, "seed", join="outer").mean("seed", keep_attrs=True)
                        for parts in curves.values()],
                       dim=xr.Variable("change", list(curves)), join="outer", combine_attrs="override")
    entries = [entry for seeds in found.values() for entry in seeds.values()]
    verdict = {"task": args.task, "setting": {"examples": args.examples, "task": entries[0].task.to_dict(),
                                              "settled": SETTLED},
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    write(args, {**verdict, "ablations": table}, joined)
    return 0


def render(args: Ablations) -> int:
    """Words, table and pages from stored measurements; 2 if there are none, or a measure is not among them."""
    try:
        results = read_results(args.results / f"ablations-{args.task}")
    except FileNotFoundError as error:
        print(f"{error} Without --render, `python studies/ablations.py` measures.", file=sys.stderr)
        return 2
    table = results.verdict["ablations"]
    if missing := sorted({key for row in table for key in MEASURES if key not in row["values"]}):
        print(f"{results.path} lacks the measures {', '.join(missing)}: measure again, without --render.",
              file=sys.stderr)
        return 2
    write(args, {**results.verdict, "ablations": [
        {**row, "values": {key: row["values"][key] for key in MEASURES}} for row in table]}, results.datasets["curves"])
    return 0


def write(args: Ablations, measured: dict[str, Any], curves: xr.Dataset) -> None:
    """The results folder and ablations.md, in the words of today, from what was measured."""
    verdict = {**measured, "words": words(measured["ablations"]), "measures": {
        key: {"name": name, "definition": text, "undefined": UNDEFINED.get(key, "")}
        for key, (name, text) in MEASURES.items()}}
    folder = write_results(args.results / f"ablations-{args.task}", verdict=verdict, datasets={"curves": curves},
                           html=report(verdict, figures(curves)))
    (args.results / "ablations.md").write_text(page(verdict))
    print(page(verdict))
    print(f"Written to {folder}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Ablations, description=__doc__)))
