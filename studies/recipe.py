"""Which training recipe makes a LoopMDM use its loops? One change of the recipe at a time, at equal training FLOPs.

    python studies/recipe.py                                  # train what is missing, write results/recipe.md
    python studies/recipe.py --tasks stories --changes before --seeds 0 1 2
    python studies/recipe.py --no-train                       # the page again, from results/recipe.json

The recipe is what the presets say; a change sets it back, or tries another option. A run that is killed goes on when
the command is given again. Runs are kept in results/recipe.json with their last metrics, and the page is made from
them: differences are paired by seed, with a 95% interval of Student's t over seeds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from studies.checks import writable
from studies.questions.recipe.measure import CHANGES, configure, kept
from studies.questions.recipe.page import page
from studies.results import RESULTS
from studies.training.presets import PRESETS
from studies.training.run import train


@dataclass(frozen=True)
class Recipe:
    """Compare training recipes."""

    tasks: tuple[str, ...] = ("stories", "automaton")
    """Presets to train."""
    changes: tuple[str, ...] = tuple(CHANGES)
    """Which changes; "recipe" is what they are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each."""
    steps: int | None = None
    """Steps of a uniform LoopMDM whose FLOPs are everyone's budget; the preset's by default."""
    train: bool = True
    """Train what results/recipe.json does not hold."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """CPU threads."""
    runs: Path = Path("runs")
    """Where checkpoints and metrics live while training."""
    results: Path = RESULTS
    """Where recipe.json and recipe.md go."""


def read(results: Path) -> list[dict[str, Any]]:
    """The runs that were made, or none."""
    file = results / "recipe.json"
    return list(json.loads(file.read_text())) if file.exists() else []


def main(args: Recipe) -> int:
    """Train and write; 2 for unknown names, or if there is nothing to write about."""
    for what, given, known in (("preset", args.tasks, PRESETS), ("change", args.changes, CHANGES)):
        if unknown := sorted(set(given) - set(known)):
            print(f"no {what} is called {', '.join(unknown)}; there are {', '.join(known)}.", file=sys.stderr)
            return 2
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    done = read(args.results)
    wanted = [(task, change, seed) for seed in args.seeds for task in args.tasks for change in args.changes]
    for task, change, seed in wanted if args.train else ():
        config = configure(task, change, seed, steps=args.steps, runs=args.runs, threads=args.threads,
                           device=args.device)
        key = {"task": task, "change": change, "seed": seed, "budget_flops": config.budget_flops}
        if any(key.items() <= run.items() for run in done):
            continue
        result = train(config)
        done.append({**key, "difficulty": config.task.to_dict(), "seconds": round(result.seconds), **kept(result)})
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "recipe.json").write_text(json.dumps(done, indent=1) + "\n")
    if not any(run["change"] == "recipe" for run in done):
        print(f"{args.results / 'recipe.json'} holds no run of the recipe itself: train it with "
              "`python studies/recipe.py --changes recipe`.", file=sys.stderr)
        return 2
    text = page(done, {change: what for change, (what, _) in CHANGES.items()})
    (args.results / "recipe.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Recipe, description=__doc__)))
