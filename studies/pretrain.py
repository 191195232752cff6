"""Train a LoopMDM beside its unlooped twin and deep twin, at equal training FLOPs.

    python studies/pretrain.py --preset automaton                      # the triplet, seed 0
    python studies/pretrain.py --preset automaton --kinds loop --seeds 1 2
    python studies/pretrain.py --list                                  # tasks and presets

The twin has the LoopMDM's parameters and runs its layers once; the deep twin has as many
layers as the LoopMDM applies on average. Every run stops at the same counted FLOPs. A run
that is killed goes on from its last checkpoint when the same command is given again, and
ends in the same weights. Finished runs become zoo entries with a card.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.folders import seeded
from studies.training.machine import Precision
from studies.training.presets import PRESETS
from studies.training.run import Kind, train
from studies.training.step import join
from studies.zoo import ZOO, export


@dataclass(frozen=True)
class Pretrain:
    """Train a preset and export it to the zoo."""

    preset: str = "automaton"
    """Which task and recipe; --list shows them."""
    kinds: tuple[Kind, ...] | None = None
    """Which of the triplet; by default all that the preset has."""
    seeds: tuple[int, ...] = (0,)
    """One run per seed. Seed 0 is the bundled one; others get the variant s<seed>."""
    steps: int | None = None
    """LoopMDM steps whose FLOPs are everyone's budget; the preset's by default."""
    time_budget_min: float | None = None
    """Stop after so many minutes in all, with a checkpoint; the same command goes on from there."""
    zoo: Path = ZOO
    """Where finished models go."""
    runs: Path = Path("runs")
    """Where checkpoints and metrics live while training."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """CPU threads; two runs of one thread each are faster than one of two."""
    precision: Precision | None = None
    """fp32 or bf16 matrix products; by default bf16 where the machine has instructions for it."""
    compile: bool | None = None
    """torch.compile the blocks; by default where a C++ compiler is there, which a CPU needs."""
    list: bool = False
    """List tasks and presets, and stop."""


def list_presets() -> str:
    """A line per preset: its name, task, steps, and time."""
    return "\n".join(f"    {name:24} {preset.task}, {preset.steps} steps, {preset.time}"
                     for name, preset in PRESETS.items())


def main(args: Pretrain) -> int:
    """Train and export; returns the exit status, 3 if the time budget ran out."""
    import time

    if args.list:
        print(list_presets())
        return 0
    if args.preset not in PRESETS:
        print(f"no preset is called {args.preset!r}; there are {', '.join(PRESETS)}.", file=sys.stderr)
        return 2
    preset = PRESETS[args.preset]
    fast = preset.recipe(args.device, precision=args.precision, compile=args.compile)
    if join().is_main:
        for note in fast.notes:
            print(note, flush=True)
    deadline = None if args.time_budget_min is None else time.monotonic() + 60 * args.time_budget_min
    for seed in args.seeds:
        for kind in args.kinds or preset.kinds:
            left = None if deadline is None else max(1.0, deadline - time.monotonic())
            chosen = {"steps": args.steps, "precision": args.precision, "compile": args.compile}
            # what this machine goes without, the command on the card goes without on any other
            if fast.precision == "fp32" and "precision" not in preset.train:
                chosen["precision"] = "fp32"
            if not fast.compile and "compile" not in preset.train:
                chosen["compile"] = False
            overrides = {key: value for key, value in chosen.items() if value is not None}
            variant, name = seeded(preset.variant, seed), preset.entry(kind, seed)
            config = preset.train_config(kind, seed, time_budget_s=left, out=str(args.runs / name),
                                         device=args.device, threads=args.threads, **overrides)
            result = train(config)
            if not result.finished:
                print(f"{name}: stopped by the time budget at step {result.step}; give the command again to go on.")
                return 3
            said = overrides if args.device == "cpu" else {"device": args.device, **overrides}
            command = f"python studies/pretrain.py --preset {args.preset} --kinds {kind} --seeds {seed}" + "".join(
                f" --{key} {value}" for key, value in said.items())
            folder = export(config, result, variant=variant, zoo=args.zoo, command=command)
            print(f"{name}: {result.step} steps, {result.flops:.3g} FLOPs, {result.seconds:.0f} s → {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Pretrain, description=f"{__doc__}\nTasks and presets:\n\n{list_presets()}")))
