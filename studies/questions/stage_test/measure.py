"""Run the stage test on every subject, a process per core, and keep each verdict as soon as it is there.

    found = measure(zoo_subjects("zoo"), Settings(), kept=Path("runs/stage_test"), workers=2)

A verdict that was kept for the same weights, settings and thresholds is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hooks import LoopedModel
from hooks.writing import written_whole
from probes import stage_test
from probes.stage_test import Verdict
from probes.thresholds import THRESHOLDS
from studies.questions.stage_test.subjects import LEVELS, Examples, Subject

VERSION = 1
"""Changes when what is measured changes, so that nothing older is taken for it."""


@dataclass(frozen=True)
class Settings:
    """How every subject is tested."""

    per_level: int = 24        # examples at each noise level
    levels: tuple[float, ...] = LEVELS
    seed: int = 0              # of examples, masks and resampling


def measure(subjects: Sequence[Subject], settings: Settings, *, kept: Path, workers: int,
            progress: bool = True) -> dict[str, dict[str, Any]]:
    """The verdict of each subject as plain data, by `Subject.key`; written to ``kept`` one by one."""
    kept.mkdir(parents=True, exist_ok=True)
    found = {subject.key: known for subject in subjects if (known := _known(subject, settings, kept)) is not None}
    missing = [subject for subject in subjects if subject.key not in found]
    bar = tqdm(total=len(subjects), initial=len(found), desc="stage test", unit="subject", disable=not progress)
    if workers > 1 and len(missing) > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(_one, subject, settings, 1): subject for subject in missing}
            for future in as_completed(running):
                _keep(running[future], settings, kept, future.result(), found, bar)
    else:
        for subject in missing:
            _keep(subject, settings, kept, _one(subject, settings, None), found, bar)
    bar.close()
    return {subject.key: found[subject.key] for subject in subjects}


def _one(subject: Subject, settings: Settings, threads: int | None) -> dict[str, Any]:
    if threads is not None:
        torch.set_num_threads(threads)
    return tested(subject, settings)


def tested(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The stage test of one subject: the range that is judged at every noise level, and loops far beyond training."""
    began = time.monotonic()
    models = subject.load()
    levels = settings.levels if subject.whole else settings.levels[:1]
    drawn = subject.examples(settings.per_level, settings.seed, levels)
    n_loops = subject.n_loops
    if n_loops is None and subject.layers_per_loop is None:
        n_loops = needed_loops(models, subject.examples(settings.per_level, settings.seed + 1, levels))
    near = _verdict(subject, models, drawn, n_loops=n_loops, settings=settings)
    told = {"name": subject.name, "kind": subject.kind, "about": subject.about, "seeds": list(subject.seeds),
            "entries": list(subject.entries), "n_loops": n_loops, "verdict": near.to_dict()}
    if subject.far is not None:
        few = _at_highest_level(drawn)
        far = _verdict(subject, models[:1], few, n_loops=subject.far[1], settings=settings, loop_ranges=[subject.far])
        told["far"] = far.to_dict()
    return {**told, "seconds": round(time.monotonic() - began, 1)}


FEWEST_LOOPS = 3
"""Loops of a forward that is judged: with loop 0 apart, two remain to be compared."""
NEEDED = 0.1
"""Share of the gain of all loops that may be missing after the loops that are needed."""


@torch.no_grad()
def needed_loops(models: Sequence[LoopedModel], drawn: Examples) -> int:
    """The fewest loops after which the answer is nearly as good as it becomes, the median over ``models``.

    Of a run that is longer than the answer needs, no loop is missed when it is left out, and none can be judged.
    """
    return int(np.median([_needed(model, drawn) for model in models]))


def _needed(model: LoopedModel, drawn: Examples) -> int:
    nll = []
    for n_loops in range(1, model.max_loops + 1):
        state, context = model.enter(drawn.inputs, n_loops, t=drawn.t)
        log_p = model.resume(0, state, context).log_softmax(-1)
        nll.append(-float(log_p.gather(-1, drawn.targets[..., None])[..., 0][drawn.scored].mean()))
    enough = min(nll) + NEEDED * (nll[0] - min(nll))
    return max(FEWEST_LOOPS, 1 + next(k for k, value in enumerate(nll) if value <= enough))


def _verdict(subject: Subject, models: Sequence[LoopedModel], drawn: Examples, *, n_loops: int | None,
             settings: Settings, loop_ranges: list[tuple[int, int]] | None = None) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return stage_test(models, drawn.inputs, targets=drawn.targets, scored=drawn.scored, t=drawn.t, n_loops=n_loops,
                          layers_per_loop=subject.layers_per_loop, loop_ranges=loop_ranges, seed=settings.seed)


def _at_highest_level(drawn: Examples) -> Examples:
    if drawn.t is None:
        return drawn
    rows = drawn.t == drawn.t.max()
    return Examples(drawn.inputs[rows], drawn.targets[rows], drawn.scored[rows], drawn.t[rows])


# -------------------------------------------------------------------------------- keeping

def _asked(subject: Subject, settings: Settings) -> str:
    """What a verdict depends on, in short."""
    what = [VERSION, subject.key, subject.identity, subject.n_loops, subject.layers_per_loop, subject.far,
            asdict(settings), asdict(THRESHOLDS)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _file(subject: Subject, kept: Path) -> Path:
    return kept / f"{subject.key.replace(' ', '_').replace(',', '')}.json"


def _known(subject: Subject, settings: Settings, kept: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(_file(subject, kept).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return told["found"] if told.get("asked") == _asked(subject, settings) else None


def _keep(subject: Subject, settings: Settings, kept: Path, told: dict[str, Any], found: dict[str, dict[str, Any]],
          bar: tqdm) -> None:
    with written_whole(_file(subject, kept)) as temporary:
        temporary.write_text(json.dumps({"asked": _asked(subject, settings), "found": told}))
    found[subject.key] = told
    bar.set_postfix_str(f"{subject.key}: {told['verdict']['regime']}")
    bar.update()
