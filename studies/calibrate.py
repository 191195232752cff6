"""Does the stage test say what is true? Its verdicts on controls whose truth is known by construction.

    python studies/calibrate.py                               # all cases that were not run yet, then the pages
    python studies/calibrate.py --workers 2                   # on two cores
    python studies/calibrate.py --families codec untrained    # some kinds of controls
    python studies/calibrate.py --render                      # tables and pages again, from what was measured

Each case is kept as soon as it is done, and a run that is killed goes on where it stopped. Results are in
results/calibration/: calibration.json (every case), page.md, report.html and figures.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from hooks.writing import written_whole
from probes.thresholds import THRESHOLDS
from studies.checks import at_least, writable
from studies.questions.calibrate.figures import figures
from studies.questions.calibrate.judge import judge
from studies.questions.calibrate.measure import Case, cases, run_case
from studies.questions.calibrate.page import html_report, page
from studies.questions.controls.codec_files import CODECS
from studies.results import RESULTS
from studies.zoo import ZOO


@dataclass(frozen=True)
class Calibrate:
    """Call the stage test on controls of known truth."""

    families: tuple[str, ...] = ()
    """Kinds of controls to run; all by default."""
    render: bool = False
    """Run nothing: tables and pages from the cases that were run."""
    again: bool = False
    """Forget the cases that were run before."""
    pictures: bool = True
    """Write the figures as SVG files, too."""
    workers: int = 1
    """Processes; each works with one thread."""
    zoo: Path = ZOO
    """Where the models are."""
    codecs: Path = CODECS
    """Where the codecs are."""
    runs: Path = Path("runs")
    """Where cases are kept while they are run."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers)


def main(args: Calibrate) -> int:
    """Run and write; 2 for unknown families, or if there is nothing to write about."""
    todo = cases(args.zoo, args.codecs)
    if unknown := sorted(set(args.families) - {case.family for case in todo}):
        print(f"no controls are called {', '.join(unknown)}; there are "
              f"{', '.join(dict.fromkeys(case.family for case in todo))}.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)   # the same numbers, however many processes there are
    file = args.runs / "calibration" / "cases.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if args.again:
        file.unlink(missing_ok=True)
    done = _rows(file)
    if not args.render:
        run_cases(args, todo, done, file)
    rows = [done[case.key] for case in todo if case.key in done]
    if not rows:
        print(f"{file} holds no case: run `python studies/calibrate.py` without --render.", file=sys.stderr)
        return 2
    write(args, rows, missing=len(todo) - len(rows))
    return 0


def run_cases(args: Calibrate, todo: Sequence[Case], done: dict[str, dict[str, Any]], file: Path) -> None:
    """Run the cases that are not done, each written to ``file`` as it ends."""
    left = [case for case in todo if case.key not in done and (not args.families or case.family in args.families)]
    with file.open("a", encoding="utf-8") as out, tqdm(total=len(left), desc="cases", disable=None) as progress:
        for row in _rows_of(args, left):
            done[row["key"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            progress.set_postfix_str(row["key"])
            progress.update()


def _rows_of(args: Calibrate, left: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """The rows of cases, by one process or several; cases of one subject stay together."""
    if args.workers == 1:
        yield from map(run_case, left)
        return
    groups = [[case.key for case in group] for _, group in
              groupby(left, key=lambda case: (case.family, case.control, case.dial, case.seed))]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_keys, args.zoo, args.codecs, keys) for keys in groups]
        for finished in as_completed(running):
            yield from finished.result()


def run_keys(zoo: Path, codecs: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of some cases, in a process of its own."""
    torch.set_num_threads(1)
    wanted = set(keys)
    return [run_case(case) for case in cases(zoo, codecs) if case.key in wanted]


def write(args: Calibrate, rows: Sequence[dict[str, Any]], *, missing: int) -> None:
    """results/calibration/, whole or not at all."""
    found = judge(rows)
    stored = {"thresholds": asdict(THRESHOLDS), "found": found, "missing": missing,
              "provenance": {"program": "python studies/calibrate.py", "seconds": sum(row["seconds"] for row in rows),
                             "workers": args.workers, "cases": len(rows),
                             "versions": {"python": platform.python_version(), "torch": torch.__version__}},
              "cases": list(rows)}
    drawn = figures(found)
    text = page(stored, tuple(drawn) if args.pictures else ())
    print(text)
    with written_whole(args.results / "calibration") as temporary:
        temporary.mkdir()
        (temporary / "calibration.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False, allow_nan=False)
                                                    + "\n")
        (temporary / "page.md").write_text(text)
        (temporary / "report.html").write_text(html_report(stored, drawn))
        if args.pictures:
            for name, (_, figure) in drawn.items():
                figure.write_image(temporary / f"{name}.svg")
    if missing:
        print(f"{missing} cases were not run: `python studies/calibrate.py` runs them.")


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    """Cases that were run, by key; a line that a killed run left half written is not one."""
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Calibrate, description=__doc__)))
