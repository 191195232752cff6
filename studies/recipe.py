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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from studies.presets import PRESETS
from studies.recipe_report import page
from studies.results import RESULTS
from studies.training import TrainConfig, train

CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe": ("the recipe: S growing, exact mask sizes", {}),
    "before": ("S uniform and each token masked for itself", {"loops_drawn": "uniform", "masks": "bernoulli"}),
    "uniform": ("S uniform from the first step", {"loops_drawn": "uniform"}),
    "bernoulli": ("each token masked for itself", {"masks": "bernoulli"}),
    "bell": ("middle noise levels more often", {"noise_levels": "bell"}),
    "wsd": ("learning rate constant, then falling in the last fifth", {"schedule": "wsd"}),
    "embedding": ("the token embedding injected at each loop", {"model": {"input_injection": "add"}}),
    "head": ("the head's output injected at each loop", {"model": {"input_injection": "head"}}),
}
"""What is compared: name, description, and the fields of `TrainConfig` that differ; ``model`` ones are added."""

KEPT = ("step", "flops", "nelbo", "nelbo@1", "exact", "loops_idle")
"""What the page needs of a run's last metrics; ``exact`` is that of S_max."""


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
    threads: int | None = None
    """CPU threads."""
    runs: Path = Path("runs")
    """Where checkpoints and metrics live while training."""
    results: Path = RESULTS
    """Where recipe.json and recipe.md go."""


def configure(task: str, change: str, seed: int, *, steps: int | None, runs: Path, threads: int | None) -> TrainConfig:
    """The run of a LoopMDM under one change. The unchanged one is the run that `pretrain.py` makes, and its folder."""
    preset = PRESETS[task]
    base = preset.train_config("loop", seed, steps=steps, threads=threads)
    fields = dict(CHANGES[change][1])
    model = {**base.model, **fields.pop("model", {})}
    if change == "recipe" and base.budget_flops == preset.train_config("loop", seed).budget_flops:
        name = preset.entry("loop", seed)
    else:
        name = "-".join(filter(None, ("recipe", task, change, f"{steps}steps" if steps else "", f"s{seed}")))
    return replace(base, model=model, out=str(runs / name), **fields)


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
    done = read(args.results)
    wanted = [(task, change, seed) for seed in args.seeds for task in args.tasks for change in args.changes]
    for task, change, seed in wanted if args.train else ():
        config = configure(task, change, seed, steps=args.steps, runs=args.runs, threads=args.threads)
        key = {"task": task, "change": change, "seed": seed, "budget_flops": config.budget_flops}
        if any(key.items() <= run.items() for run in done):
            continue
        result = train(config)
        last = result.metrics[-1]
        last = {**last, "exact": last[f"exact@{result.model.config.max_loops}"]}
        done.append({**key, "difficulty": config.task.to_dict(), "seconds": round(result.seconds),
                     **{name: last[name] for name in KEPT}})
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
