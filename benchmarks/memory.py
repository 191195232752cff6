"""Peak memory of a run with a reducer, without, and unrecorded at 1, 8 and 24 loops; the time of ``import hooks``.

Memory is measured in two ways: the peak of the allocator, from torch's profiler (exact), and by how much the
run raised the peak resident size (what the system sees: fragmentation counts). The profiler takes memory itself, so
the second runs without it; and it depends on where the system happens to put things, so it is measured in several
processes.

    peaks([24], processes=7)[24, "norms"]       # Peak(allocated_mb=53.0, resident_mb=array([…]))
    import_ratio(repeats=7)                     # import hooks ÷ import torch
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from benchmarks.timing import Estimate, compare

Kept = Literal["nothing", "norms", "all"]
"""What is recorded of resid_post of every layer and loop: no hooks at all, a reducer's norms, or everything."""


class Peak(NamedTuple):
    """Peak memory of one run above what was there before it."""

    allocated_mb: float
    resident_mb: np.ndarray  # [process]


def peaks(loops: Sequence[int], *, processes: int, batch: int = 32, pos: int = 128,
          width: int = 256) -> dict[tuple[int, Kept], Peak]:
    """One forward in each of several fresh processes, by turns; by (loops, what is recorded)."""
    cases: list[tuple[int, Kept]] = [(n, kept) for n in loops for kept in get_args(Kept)]

    def mb(case: tuple[int, Kept], profiled: bool) -> float:
        return _in_a_process({"n_loops": case[0], "kept": case[1], "batch": batch, "pos": pos, "width": width,
                              "profiled": profiled})

    resident = [{case: mb(case, False) for case in cases} for _ in range(processes)]
    return {case: Peak(mb(case, True), np.array([turn[case] for turn in resident])) for case in cases}


def _in_a_process(arguments: dict[str, object]) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", json.dumps(arguments)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run in a process of its own failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def import_ratio(repeats: int) -> tuple[Estimate, dict[str, float]]:
    """Time of ``import hooks`` ÷ ``import torch``, in fresh processes by turns; and their medians in seconds."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    times: dict[str, list[float]] = {"hooks": [], "torch": []}
    for i in range(repeats + 1):
        for name in times if i % 2 else reversed(times):
            out = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
            if i:  # the first pair warms the disk cache
                times[name].append(float(out.stdout))
    arrays = {name: np.array(values) for name, values in times.items()}
    return compare(arrays, "hooks", "torch"), {name: float(np.median(values)) for name, values in arrays.items()}


def _one_run(n_loops: int, kept: Kept, batch: int, pos: int, width: int, profiled: bool) -> float:
    """MiB that a run takes at its peak, above what was there before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from hooks import HookedLoopMDM, LoopMDMConfig
    from hooks.reducers import Norm

    torch.set_num_threads(1)
    model = HookedLoopMDM(LoopMDMConfig(vocab_size=64, mask_token_id=63, max_seq_len=pos, d_model=width, n_heads=4,
                                        d_mlp=4 * width, max_loops=8)).eval()
    tokens = torch.randint(0, 64, (batch, pos), generator=torch.Generator().manual_seed(0))
    reducer = Norm() if kept == "norms" else None

    def record() -> None:
        if kept == "nothing":
            model(tokens, n_loops)
        else:
            model.run_with_cache(tokens, n_loops, names_filter="blocks.*.hook_resid_post", reduce=reducer)

    with torch.no_grad():
        model(tokens[:1], 1)
        if not profiled:
            before = resident_mb(afresh=True)
            record()
            return resident_mb() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            record()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2 ** 20


def resident_mb(*, afresh: bool = False) -> float:
    """The process's peak resident size so far; ``afresh`` forgets earlier peaks first, where the system can.

    Linux counts a new process's ``ru_maxrss`` from its parent's size, so there the kernel's own mark is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        if afresh:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 10 if sys.platform != "darwin" else 2 ** 20)


if __name__ == "__main__":
    print(json.dumps(_one_run(**json.loads(sys.argv[1]))))
