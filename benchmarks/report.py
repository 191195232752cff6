"""The benchmark's tables, as Markdown: docs/benchmarks.md between two markers.

    write(speed, times, memory, root)
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

from benchmarks.memory import Kept, Peak
from benchmarks.speed import Comparison
from benchmarks.timing import Estimate, Times, compare, milliseconds
from hooks.writing import written_whole
from studies.readme import between


def comparison_table(lines: list[Comparison]) -> str:
    """One row per comparison: the median ratio with its interval, the target, and whether it holds."""
    rows = ["| model | comparison | median ratio [95%] | target | holds |", "|---|---|---|---|---|"]
    for line in lines:
        target = "–" if line.target is None else f"≤ {line.target:g}"
        rows.append(f"| {line.size} | {line.what} | {line.ratio} | {target} | {_verdict(line.holds)} |")
    return "\n".join(rows)


def memory_table(peaks: dict[tuple[int, Kept], Peak]) -> str:
    """Peak memory by loops: unrecorded, with a reducer, and with everything kept."""
    rows = ["| loops | unrecorded: allocated | resident | reduced to norms: allocated | resident "
            "| everything kept: allocated | resident |", "|---|---|---|---|---|---|---|"]
    for loops in sorted({loops for loops, _ in peaks}):
        cells = [f"{peak.allocated_mb:.1f} MiB | {np.median(peak.resident_mb):.1f} MiB"
                 for peak in (peaks[loops, "nothing"], peaks[loops, "norms"], peaks[loops, "all"])]
        rows.append(f"| {loops} | {' | '.join(cells)} |")
    return "\n".join(rows)


def import_lines(ratio: Estimate, seconds: dict[str, float]) -> list[Comparison]:
    return [Comparison("–", f"`import hooks` ({seconds['hooks']:.2f} s) ÷ `import torch` ({seconds['torch']:.2f} s)",
                       ratio, 1.3)]


def memory_lines(peaks: dict[tuple[int, Kept], Peak]) -> list[Comparison]:
    """What torch allocates is the recorder's doing; the resident size varies with how the heap happens to break up,
    unrecorded too, and so is compared with that."""
    most = max(loops for loops, _ in peaks)
    many, one, bare = peaks[most, "norms"], peaks[1, "norms"], peaks[most, "nothing"]
    allocated = many.allocated_mb / one.allocated_mb
    return [Comparison("–", f"peak allocated memory with a reducer, {most} loops ÷ 1",
                       Estimate(allocated, allocated, allocated), 1.1),
            Comparison("–", f"peak resident memory with a reducer, {most} loops ÷ 1",
                       _ratio(many.resident_mb, one.resident_mb), None),
            Comparison("–", f"peak resident memory at {most} loops, with a reducer ÷ unrecorded",
                       _ratio(many.resident_mb, bare.resident_mb), None)]


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    return compare({"ours": ours, "theirs": theirs}, "ours", "theirs")


def times_table(times: dict[str, Times]) -> str:
    """Median milliseconds of every contender."""
    rows = ["| model | what ran | ms, median [95%] |", "|---|---|---|"]
    rows += [f"| {size} | {name} | {milliseconds(of_size, name)} |" for size, of_size in times.items()
             for name in of_size]
    return "\n".join(rows)


def write(lines: list[Comparison], times: dict[str, Times], peaks: dict[tuple[int, Kept], Peak], root: Path) -> None:
    """The tables of docs/benchmarks.md, between its markers."""
    processes = len(next(iter(peaks.values())).resident_mb)
    tables = "\n\n".join([
        "Written by `make bench`. Ratios are medians over alternating runs in one process, "
        "with 95% bootstrap intervals over rounds; times are processor time on one thread "
        f"({platform.machine()}, {platform.system()}, torch {torch.__version__}).",
        comparison_table(lines), "## Memory", "One head, two looped and one tail layer of width 256, batch 32 × 128, "
        f"resid_post of every layer and loop; resident size: median over {processes} processes of each kind.",
        memory_table(peaks), "## Times", times_table(times)])
    page = root / "docs" / "benchmarks.md"
    text = between(page.read_text(), "benchmarks", tables)
    with written_whole(page) as temporary:
        temporary.write_text(text)


def _verdict(holds: bool | None) -> str:
    return "–" if holds is None else "yes" if holds else "**no**"
