"""The paper's claims about compute, tested on the zoo: writes results/claims.md.

    python studies/claims.py                              # every task of which there is a LoopMDM and a twin
    python studies/claims.py --groups automaton           # one task, all its seeds
    python studies/claims.py --examples 1024 --few 256    # with narrower intervals over examples
    python studies/claims.py --stored                     # judge and draw again what was measured before

(a) training FLOPs to the twin's NELBO, (b) the deep twin, (c) loops up to 4·S_max, (d) noise
levels, (e) mask-to-mask attention, (f) adaptive looping, (g) loops against denoising steps.
Results of groups that are not asked for are kept. For each group results/claims-<group>/
holds verdict.json, measurements.nc, report.html and the figures as SVG (which need Chrome or
Chromium; `--no-pictures` goes without).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
import xarray as xr
from tqdm import tqdm

from studies.checks import at_least, writable
from studies.questions.claims.figures import figures
from studies.questions.claims.judge import Judgement, judge
from studies.questions.claims.measure import SampleSizes, measure
from studies.questions.claims.page import TITLES, Group, group_page, page
from studies.results import RESULTS, provenance, read_results, write_results
from studies.zoo import ZOO, Entry, Problem, find_groups, read_json, read_metrics, skipped


@dataclass(frozen=True)
class PaperClaims:
    """Test the paper's claims on the triplets of a zoo."""

    groups: tuple[str, ...] = ()
    """Task and variant without the seed, such as automaton or sudoku-6x6; all of the zoo by default."""
    examples: int = 256
    """Held-out examples of (b), (c) and (f)."""
    few: int = 96
    """Held-out examples of the costlier (d), (e) and (g)."""
    seed: int = 0
    """Of examples, noise levels and masks."""
    stored: bool = False
    """Judge and draw the measurements in the results folder again; runs no model."""
    pictures: bool = True
    """Write figures as SVG files, too."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples, few=self.few)


def pool(measured: dict[int, dict[str, xr.Dataset]]) -> dict[str, xr.Dataset]:
    """Measurements of all seeds, joined on a new axis ``seed``; NaN where a seed lacks a kind."""
    return {name: xr.concat([datasets[name] for datasets in measured.values()],
                            dim=xr.Variable("seed", list(measured)), join="outer", coords="minimal",
                            compat="equals", combine_attrs="override")
            for name in next(iter(measured.values()))}


def study(name: str, seeds: dict[int, dict[str, Entry]], args: PaperClaims) -> None:
    """Measure and judge one group, and write its folder."""
    began = time.monotonic()
    sizes = SampleSizes(examples=args.examples, few=args.few, seed=args.seed)
    bar = tqdm(total=6 * len(seeds), desc=name, disable=None)

    def progress(part: str) -> None:
        bar.set_postfix_str(part)
        bar.update()

    torch.manual_seed(args.seed)
    pooled = pool({seed: measure(models, sizes, progress) for seed, models in seeds.items()})
    bar.close()
    entries = [entry for models in seeds.values() for entry in models.values()]
    group = Group(name, task_in_words(entries[0]), list(seeds), [entry.name for entry in entries], judge(pooled))
    write_group(group, pooled, args, provenance(args, entries, seconds=time.monotonic() - began))


def study_again(name: str, args: PaperClaims) -> None:
    """Judge and draw one group's stored measurements. FileNotFoundError or ValueError name what does not fit."""
    results = read_results(args.results / f"claims-{name}")
    saved, pooled = results.verdict, results.datasets
    try:
        group = Group(saved["group"], saved["task"], saved["seeds"], saved["entries"], judge(pooled))
        write_group(group, pooled, args, saved["provenance"])
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{results.path} lacks {error}: it was measured by another version. Measure it again with "
                         f"`python studies/claims.py --groups {name}`.") from error


def write_group(group: Group, pooled: dict[str, xr.Dataset], args: PaperClaims, made: dict[str, Any]) -> None:
    """The folder of one judged group."""
    drawn = figures(pooled)
    verdict = {"group": group.name, "task": group.task, "seeds": group.seeds, "entries": group.entries,
               "claims": {letter: judgement.to_dict() for letter, judgement in group.judgements.items()},
               "provenance": made}
    folder = write_results(args.results / f"claims-{group.name}", study="claims", verdict=verdict, datasets=pooled,
                           html=group_page(group, drawn))
    if args.pictures:
        for letter, figure in drawn.items():
            figure.write_image(folder / f"{letter}.svg")


def task_in_words(entry: Entry) -> str:
    """The task and its difficulty, in words."""
    difficulty = ", ".join(f"{key} {value}" for key, value in entry.card["task"].items() if key != "name")
    return f"{entry.task.name} ({difficulty})"


def read_groups(results: Path) -> list[Group]:
    """Every group that has been judged, from its verdict.json; damaged ones are left out with a warning each."""
    groups = []
    for path in sorted(results.glob("claims-*/verdict.json")):
        try:
            saved = read_json(path)
            judgements = {letter: Judgement.from_dict(saved["claims"][letter]) for letter in TITLES}
            groups.append(Group(saved["group"], saved["task"], saved["seeds"], saved["entries"], judgements))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"it is incomplete ({error})"
            skipped(Problem(path, f"{reason}; make it again with `python studies/claims.py`."))
    return groups


def measured_groups(args: PaperClaims) -> list[str]:
    """The groups that --stored is to judge again. ValueError for one that was not measured."""
    there = sorted(path.parent.name.removeprefix("claims-") for path in args.results.glob("claims-*/measurements.nc"))
    if unknown := sorted(set(args.groups) - set(there)):
        raise ValueError(f"no measurements of {', '.join(unknown)} are in {args.results}; there are "
                         f"{', '.join(there) or 'none'}. Measure them without --stored.")
    return list(args.groups) or there


def main(args: PaperClaims) -> int:
    """Run the study; 2 if a group is not in the zoo, or with --stored not in the results, or they cannot be written."""
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if args.stored:
        try:
            for name in measured_groups(args):
                study_again(name, args)
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return conclude(args)
    available = find_groups(args.zoo, check=read_metrics)
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
    return conclude(args)


def conclude(args: PaperClaims) -> int:
    """Write the page of all groups, and say what was found."""
    groups = read_groups(args.results)
    text = page(groups, command="python studies/claims.py", pictures=args.pictures)
    (args.results / "claims.md").write_text(text)
    for group in groups:
        for letter, judgement in group.judgements.items():
            first = judgement.quantities[0].text if judgement.quantities else judgement.missing
            print(f"{group.name:16} ({letter}) {judgement.word:20} {first}")
    print(f"\nWritten to {args.results / 'claims.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PaperClaims, description=__doc__)))
