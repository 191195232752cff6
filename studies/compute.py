"""The paper's claims about compute, tested on the zoo: writes results/claims.md.

    python studies/compute.py                              # every task of which there is a LoopMDM and a twin
    python studies/compute.py --groups automaton           # one task, all its seeds
    python studies/compute.py --examples 1024 --few 256    # with narrower intervals over examples

(a) training FLOPs to the twin's NELBO, (b) the deep twin, (c) loops up to 4·S_max, (d) noise
levels, (e) mask-to-mask attention, (f) adaptive looping, (g) loops against denoising steps.
Results of groups that are not asked for are kept. For each group results/claims-<group>/
holds verdict.json, measurements.nc, report.html and the figures as SVG (which need Chrome or
Chromium; `--no-pictures` goes without).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
import xarray as xr
from tqdm import tqdm

from studies.checks import at_least
from studies.claims_judge import Judgement, judge
from studies.claims_measure import Setting, measure
from studies.claims_report import Group, claim_figures, claims_page, group_page
from studies.results import RESULTS, provenance, write_results
from studies.zoo import ZOO, Entry, load, names


@dataclass(frozen=True)
class Compute:
    """Test the paper's claims on the triplets of a zoo."""

    groups: tuple[str, ...] = ()
    """Task and variant without the seed, such as automaton or sudoku-6x6; all of the zoo by default."""
    examples: int = 256
    """Held-out examples of (b), (c) and (f)."""
    few: int = 96
    """Held-out examples of the costlier (d), (e) and (g)."""
    seed: int = 0
    """Of examples, noise levels and masks."""
    pictures: bool = True
    """Write figures as SVG files, too."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples, few=self.few)


def find_groups(zoo: Path) -> dict[str, dict[int, dict[str, Entry]]]:
    """group → seed → kind → entry; seeds of which there are a LoopMDM and a twin."""
    found: dict[str, dict[int, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for name in names(zoo):
        entry = load(zoo / name)
        variant = re.sub(r"(^|-)s\d+$", "", str(entry.card.get("variant", "")))
        group = "-".join(filter(None, (entry.task.name, variant)))
        found[group][int(entry.card["seed"])][entry.kind] = entry
    whole = {group: {seed: kinds for seed, kinds in sorted(seeds.items()) if {"loop", "twin"} <= set(kinds)}
             for group, seeds in found.items()}
    return {group: seeds for group, seeds in sorted(whole.items()) if seeds}


def pool(measured: dict[int, dict[str, xr.Dataset]]) -> dict[str, xr.Dataset]:
    """Measurements of all seeds, joined on a new axis ``seed``; NaN where a seed lacks a kind."""
    return {name: xr.concat([datasets[name] for datasets in measured.values()],
                            dim=xr.Variable("seed", list(measured)), join="outer", coords="minimal",
                            compat="equals", combine_attrs="override")
            for name in next(iter(measured.values()))}


def study(name: str, seeds: dict[int, dict[str, Entry]], args: Compute) -> None:
    """Measure and judge one group, and write its folder."""
    began = time.monotonic()
    setting = Setting(examples=args.examples, few=args.few, seed=args.seed)
    bar = tqdm(total=6 * len(seeds), desc=name, disable=None)

    def progress(part: str) -> None:
        bar.set_postfix_str(part)
        bar.update()

    torch.manual_seed(args.seed)
    pooled = pool({seed: measure(models, setting, progress) for seed, models in seeds.items()})
    bar.close()
    entries = [entry for models in seeds.values() for entry in models.values()]
    judgements = judge(pooled)
    group = Group(name, describe(entries[0]), list(seeds), [entry.name for entry in entries], judgements)
    figures = claim_figures(pooled)
    verdict = {"group": name, "task": group.task, "seeds": group.seeds, "entries": group.entries,
               "claims": {letter: judgement.to_dict() for letter, judgement in judgements.items()},
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    folder = write_results(args.results / f"claims-{name}", verdict=verdict, datasets=pooled,
                           html=group_page(group, figures))
    if args.pictures:
        for letter, figure in figures.items():
            figure.write_image(folder / f"{letter}.svg")


def describe(entry: Entry) -> str:
    """The task and its difficulty, in words."""
    difficulty = ", ".join(f"{key} {value}" for key, value in entry.card["task"].items() if key != "name")
    return f"{entry.task.name} ({difficulty})"


def read_groups(results: Path) -> list[Group]:
    """Every group that has been judged, from its verdict.json."""
    groups = []
    for path in sorted(results.glob("claims-*/verdict.json")):
        saved = json.loads(path.read_text())
        judgements = {letter: Judgement.from_dict(values) for letter, values in saved["claims"].items()}
        groups.append(Group(saved["group"], saved["task"], saved["seeds"], saved["entries"], judgements))
    return groups


def main(args: Compute) -> int:
    """Run the study; 2 if a group is not in the zoo."""
    available = find_groups(args.zoo)
    if unknown := sorted(set(args.groups) - set(available)):
        print(f"no LoopMDM and twin of {', '.join(unknown)} in {args.zoo}; there are {', '.join(available) or 'none'}. "
              "Train them with `python studies/pretrain.py`.", file=sys.stderr)
        return 2
    if not available:
        print(f"no LoopMDM and twin of the same task are in {args.zoo}: train them with `python studies/pretrain.py`.",
              file=sys.stderr)
        return 2
    for name in args.groups or available:
        study(name, available[name], args)
    groups = read_groups(args.results)
    page = claims_page(groups, command="python studies/compute.py", pictures=args.pictures)
    (args.results / "claims.md").write_text(page)
    for group in groups:
        for letter, judgement in group.judgements.items():
            first = judgement.quantities[0].text if judgement.quantities else judgement.missing
            print(f"{group.name:16} ({letter}) {judgement.word:20} {first}")
    print(f"\nWritten to {args.results / 'claims.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Compute, description=__doc__)))
