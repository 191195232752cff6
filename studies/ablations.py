"""What decides whether the state's direction settles? One change of the LoopMDM at a time, measured alike.

    python studies/pretrain.py --preset ablation-injection   # and the other ablation-* presets, all listed by --list
    python studies/ablations.py                              # writes results/ablations-automaton/ and ablations.md
    python studies/ablations.py --render                     # words, table and pages again, from what was measured

Blayney et al. (2604.11791) report that in looped language models each layer of the cycle tends to its own fixed
point, and that block size, input injection and normalisation decide whether it does. Every variant here was trained
on the same task for the same FLOPs; `studies.training.presets.ABLATIONS` says what each changes. Seeds of a variant are
averaged, and the seeds of the base say how much chance alone moves a number. Where the norm of the state grows on,
there is no fixed point; then "converged" is said of the state's direction.
"""

from __future__ import annotations

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

from studies.checks import at_least, writable
from studies.folders import without_seed
from studies.questions.ablations.figures import figures
from studies.questions.ablations.judge import judge
from studies.questions.ablations.measure import MEASURES, SETTLED, UNDEFINED, measure
from studies.questions.ablations.page import page, report
from studies.results import RESULTS, provenance, read_results, write_results
from studies.zoo import ZOO, Entry, load, names, read_card


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


def find_ablations(task: str, zoo: Path) -> dict[str, dict[int, Entry]]:
    """change → seed → entry, the base first."""
    found: dict[str, dict[int, Entry]] = {}
    for name in names(zoo):
        card = read_card(zoo / name)
        prefix, _, change = without_seed(str(card.get("variant", ""))).partition("-")
        if prefix == "ablation" and change and card["task"]["name"] == task and card["kind"] == "loop":
            found.setdefault(change, {})[int(card["seed"])] = load(zoo / name)
    return dict(sorted(found.items(), key=lambda item: item[0] != "base"))


def main(args: Ablations) -> int:
    """Run the study; 2 if the zoo holds no ablations with a base, or nothing is there to be rendered."""
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if args.render:
        return render(args)
    began = time.monotonic()
    found = find_ablations(args.task, args.zoo)
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
    write_pages(args, {**verdict, "ablations": table}, joined)
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
    write_pages(args, {**results.verdict, "ablations": [
        {**row, "values": {key: row["values"][key] for key in MEASURES}} for row in table]}, results.datasets["curves"])
    return 0


def write_pages(args: Ablations, measured: dict[str, Any], curves: xr.Dataset) -> None:
    """The results folder and ablations.md, in the words of today, from what was measured."""
    verdict = {**measured, "words": judge(measured["ablations"]), "measures": {
        key: {"name": name, "definition": text, "undefined": UNDEFINED.get(key, "")}
        for key, (name, text) in MEASURES.items()}}
    folder = write_results(args.results / f"ablations-{args.task}", study="ablations", verdict=verdict,
                           datasets={"curves": curves}, html=report(verdict, figures(curves)))
    (args.results / "ablations.md").write_text(page(verdict))
    print(page(verdict))
    print(f"Written to {folder}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Ablations, description=__doc__)))
