"""What `pretrain.py` can train: one line per preset, with the time it takes.

A preset fixes the task's difficulty, what differs from the task's default model, and the
length of the LoopMDM's run in steps; the FLOPs that follow are the budget of all three kinds.

    config = PRESETS["automaton"].train_config(kind="twin", seed=1)

All of them multiply matrices in bfloat16 and compile their blocks where the machine can
(`studies.training.machine`), which about halves the time on a CPU that has the instructions; ``--precision`` and
``--compile`` choose otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from studies.folders import entry_name, seeded
from studies.tasks import Arithmetic, Automaton, Pointer, Stories, Sudoku, Task, Text
from studies.tasks.stories_words import KINDS
from studies.training.flops import mean_loops, training_flops
from studies.training.machine import FastSettings, Precision, fastest
from studies.training.run import Kind, TrainConfig

GROWN: dict[str, Any] = {"loops_drawn": "growth", "masks": "exact"}
"""The recipe under which loops are used (results/recipe.md). Presets without it made checkpoints before it was known,
and keep making the same ones."""

ON_A_GPU = "minutes on a GPU"
"""The time of presets that are too much for a CPU."""


@dataclass(frozen=True)
class Preset:
    """A task at one difficulty, with the recipe that trains it on a small machine."""

    task: Task
    steps: int                        # of the LoopMDM; its mean cost is everyone's budget
    time: str                         # on one CPU core, measured; or what it needs instead
    kinds: tuple[Kind, ...] = ("loop", "twin", "deep")  # what is trained unless told otherwise
    variant: str = ""                 # last part of the zoo folder's name
    budget_flops: float | None = None  # instead of what ``steps`` steps of this model cost
    model: dict[str, Any] = field(default_factory=dict)   # LoopMDMConfig fields beside the task's defaults
    train: dict[str, Any] = field(default_factory=dict)   # TrainConfig fields beside the defaults

    def entry(self, kind: Kind, seed: int) -> str:
        """Name of a run, and of its zoo folder."""
        return entry_name(self.task.name, kind, seeded(self.variant, seed))

    def recipe(self, device: str = "cpu", *, precision: Precision | None = None,
               compile: bool | None = None) -> FastSettings:
        """Precision and compilation: what is given, else what the preset fixes, else what is fastest here."""
        return fastest(device, precision=self.train.get("precision") if precision is None else precision,
                       compile=self.train.get("compile") if compile is None else compile)

    def train_config(self, kind: Kind, seed: int, **overrides: Any) -> TrainConfig:
        """The run of one kind and seed, with the budget of ``steps`` LoopMDM steps at the mean loop count.

        ``precision`` and ``compile`` are those of `recipe`, unless given.
        """
        recipe = {**self.train, **overrides}
        fast = self.recipe(recipe.get("device", "cpu"), precision=overrides.get("precision"),
                           compile=overrides.get("compile"))
        recipe |= {"precision": fast.precision, "compile": fast.compile}
        steps = recipe.pop("steps", None) or self.steps
        base = TrainConfig(task=self.task, model=self.model, **recipe)
        model = base.model_config()
        per_example = training_flops(model, seq_len=self.task.seq_len, n_loops=mean_loops(model))
        budget = steps * base.batch_size * per_example
        if self.budget_flops is not None and steps == self.steps:
            budget = self.budget_flops
        return replace(base, kind=kind, seed=seed, budget_flops=budget)


_AUTOMATON = Automaton(rule=30, width=12, rows=8)
_SIX = {"n_head_layers": 1, "n_loop_layers": 2, "n_tail_layers": 3}

ABLATIONS: dict[str, dict[str, Any]] = {
    "base": _SIX,                                                                      # layers 1 and 2 of six
    "one": {"n_head_layers": 1, "n_loop_layers": 1, "n_tail_layers": 4},               # n_m
    "four": {"n_head_layers": 1, "n_loop_layers": 4, "n_tail_layers": 1},
    "first": {"n_head_layers": 0, "n_loop_layers": 2, "n_tail_layers": 4},             # placement
    "middle": {"n_head_layers": 2, "n_loop_layers": 2, "n_tail_layers": 2},
    "last": {"n_head_layers": 4, "n_loop_layers": 2, "n_tail_layers": 0},
    "all": {"n_head_layers": 0, "n_loop_layers": 6, "n_tail_layers": 0},
    "injection": {**_SIX, "input_injection": "add"},
    "layernorm": {**_SIX, "norm": "layer"},
    "no-qk-norm": {**_SIX, "qk_norm": False},
    "loop-embedding": {**_SIX, "loop_embedding": "learned"},
    "smax4": {**_SIX, "max_loops": 4},
    "smax16": {**_SIX, "max_loops": 16},
}
"""What may decide whether loops settle into cycles (2604.11791): one change each of a LoopMDM of six layers on the
automaton. All spend the FLOPs of the base's steps."""


def _ablation(change: dict[str, Any], name: str) -> Preset:
    base = Preset(_AUTOMATON, steps=1300, time="4 minutes", model=_SIX)
    return Preset(_AUTOMATON, steps=1300, time="4 minutes", kinds=("loop",), variant=f"ablation-{name}",
                  model=change, budget_flops=base.train_config("loop", 0).budget_flops)


_TWELVE = Automaton(rule=30, width=12, rows=12)
_PAPER = {"n_head_layers": 1, "n_loop_layers": 2, "n_tail_layers": 9, "max_loops": 12, "time_conditioning": "t"}
_PAPER_TRAIN = {**GROWN, "batch_size": 64}

PLACEMENTS: dict[str, dict[str, Any]] = {
    "first": {**_PAPER, "n_head_layers": 0, "n_tail_layers": 10},
    "middle": {**_PAPER, "n_head_layers": 5, "n_tail_layers": 5},
    "last": {**_PAPER, "n_head_layers": 10, "n_tail_layers": 0},
}
"""Which two of the twelve layers are looped, beside the paper's layers 1 and 2 (preset "paper-shape")."""


def _placement(change: dict[str, Any], name: str) -> Preset:
    return Preset(_TWELVE, steps=4000, time=ON_A_GPU, kinds=("loop",), variant=f"paper-{name}", model=change,
                  train=_PAPER_TRAIN)


PRESETS: dict[str, Preset] = {
    "automaton": Preset(_AUTOMATON, steps=2400, time="6 minutes per kind", train=GROWN),
    "sudoku6": Preset(Sudoku(size=6), steps=5000, time="5 minutes per kind", variant="6x6", train=GROWN),
    "stories": Preset(Stories(kinds=("directions",), steps=8), steps=2150, time="4 minutes per kind",
                      train={**GROWN, "schedule": "wsd", "lr": 4e-3, "warmup_steps": 100, "eval_every": 200,
                             "precision": "fp32", "compile": False}),   # too small to gain from either
    "sudoku9": Preset(Sudoku(size=9, level="singles", extra_givens=6, symmetries=True), steps=4000,
                      time="30 minutes per kind", variant="9x9", train={"batch_size": 64}),
    "arithmetic": Preset(Arithmetic(modulus=7, steps=8), steps=8000, time="11 minutes per kind"),
    "pointer": Preset(Pointer(keys=8, hops=4, chains=2), steps=6000, time=ON_A_GPU, model={"position": "both"},
                      train={**GROWN, "curriculum": "growth", "schedule": "wsd", "batch_size": 128, "lr": 4e-3,
                             "warmup_steps": 100}),
    "stories-large": Preset(Stories(kinds=KINDS, steps=8, distractors=2, names=100, things=120, containers=4),
                            steps=5000, time=ON_A_GPU, variant="large",
                            train={**GROWN, "batch_size": 128, "eval_every": 500},
                            model={"d_model": 128, "d_mlp": 512, "n_loop_layers": 2}),
    "text-chars": Preset(Text(length=128, vocab=257, train_tokens=4_000_000), steps=5000, time=ON_A_GPU,
                         variant="chars", model={"input_injection": "head"},
                         train={**GROWN, "batch_size": 128, "eval_every": 500}),
    "text-10m": Preset(Text(length=128, vocab=2048), steps=3000, time=ON_A_GPU, variant="10m",
                       model={"d_model": 448, "n_heads": 7, "d_mlp": 1792, "input_injection": "head"},
                       train={**GROWN, "batch_size": 64, "lr": 1e-3, "eval_every": 500}),
    "paper-shape": Preset(_TWELVE, steps=4000, time=ON_A_GPU, variant="paper", model=_PAPER, train=_PAPER_TRAIN),
    **{f"paper-shape-{name}": _placement(change, name) for name, change in PLACEMENTS.items()},
    "text": Preset(Text(length=64, vocab=2048), steps=4000, time="25 minutes per kind", kinds=("loop", "twin"),
                   train={"batch_size": 64, "lr": 1e-3}),
    **{f"ablation-{name}": _ablation(change, name) for name, change in ABLATIONS.items()},
}
