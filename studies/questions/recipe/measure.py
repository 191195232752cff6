"""Which runs the recipe study compares, and what it keeps of each.

    config = configure("stories", "before", seed=0, steps=None, runs=Path("runs"), threads=None)
    kept(train(config))["nelbo"]
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from studies.training.presets import PRESETS
from studies.training.run import TrainConfig, TrainResult

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


def configure(task: str, change: str, seed: int, *, steps: int | None, runs: Path, threads: int | None,
              device: str = "cpu") -> TrainConfig:
    """The run of a LoopMDM under one change. The unchanged one is the run that `pretrain.py` makes, and its folder."""
    preset = PRESETS[task]
    base = preset.train_config("loop", seed, steps=steps, threads=threads, device=device)
    fields = dict(CHANGES[change][1])
    model = {**base.model, **fields.pop("model", {})}
    if change == "recipe" and base.budget_flops == preset.train_config("loop", seed).budget_flops:
        name = preset.entry("loop", seed)
    else:
        name = "-".join(filter(None, ("recipe", task, change, f"{steps}steps" if steps else "", f"s{seed}")))
    return replace(base, model=model, out=str(runs / name), **fields)


def kept(result: TrainResult) -> dict[str, float]:
    """`KEPT` of a finished run."""
    last = result.metrics[-1]
    last = {**last, "exact": last[f"exact@{result.model.config.max_loops}"]}
    return {name: last[name] for name in KEPT}
