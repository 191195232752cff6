"""Speed and memory against the peers: ``python -m benchmarks`` (or ``make bench``).

Takes some minutes. ``--quick`` runs few rounds and writes nothing; ``--rounds`` sets their number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import measurements, report
from benchmarks.memory import import_ratio, peaks
from benchmarks.speed import SMALL, WIDE, measure

LOOPS = (1, 8, 24)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, print only")
    parser.add_argument("--rounds", type=int, default=None, help="rounds per model (default: each model's own)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines, times = [], {}
    for size in (SMALL, WIDE):
        print(f"timing: {size.name} …", flush=True)
        times[size.name], compared = measure(size, rounds=options.rounds or (5 if options.quick else None))
        lines += compared
    print("timing: measurements …", flush=True)
    lines += measurements.measure(SMALL, rounds=options.rounds or (1 if options.quick else 9))
    lines.append(measurements.probe_memory(processes=1 if options.quick else 3))
    print("memory and imports, in processes of their own …", flush=True)
    memory = peaks(LOOPS, processes=1 if options.quick else 3, batch=4 if options.quick else 32)
    lines += report.memory_lines(memory) + report.import_lines(*import_ratio(2 if options.quick else 9))
    print(report.comparison_table(lines), report.memory_table(memory), sep="\n\n")
    if not options.quick:
        report.write(lines, times, memory, Path(__file__).parents[1])


if __name__ == "__main__":
    main()
