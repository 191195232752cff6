"""What `pretrain.py` can train: one line per preset, with the time it takes.

A preset fixes the task's difficulty, what differs from the task's default model, and the
length of the LoopMDM's run in steps; the FLOPs that follow are the budget of all three kinds.

    config = PRESETS["automaton"].train_config(kind="twin", seed=1)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from studies.flops import mean_loops, training_flops
from studies.tasks import Arithmetic, Automaton, Pointer, Sudoku, Task, Text
from studies.training import Kind, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A task at one difficulty, with the recipe that trains it on a small machine."""

    task: Task
    steps: int                        # of the LoopMDM; its mean cost is everyone's budget
    minutes: str                      # on one CPU core, measured
    variant: str = ""                 # last part of the zoo folder's name
    model: dict[str, Any] = field(default_factory=dict)   # LoopMDMConfig fields beside the task's defaults
    train: dict[str, Any] = field(default_factory=dict)   # TrainConfig fields beside the defaults

    def train_config(self, kind: Kind, seed: int, **overrides: Any) -> TrainConfig:
        """The run of one kind and seed, with the budget of ``steps`` LoopMDM steps at the mean loop count."""
        base = TrainConfig(task=self.task, model=self.model, **self.train)
        model = base.model_config()
        per_example = training_flops(model, seq_len=self.task.seq_len, n_loops=mean_loops(model))
        budget = overrides.pop("steps", None) or self.steps
        return TrainConfig(task=self.task, model=self.model, kind=kind, seed=seed,
                           budget_flops=budget * base.batch_size * per_example, **{**self.train, **overrides})


PRESETS: dict[str, Preset] = {
    "automaton": Preset(Automaton(rule=30, width=12, rows=8), steps=2400, minutes="10 per kind"),
    "sudoku6": Preset(Sudoku(size=6), steps=3000, minutes="16 per kind", variant="6x6"),
    "sudoku9": Preset(Sudoku(size=9), steps=60_000, minutes="for a GPU; days", variant="9x9",
                      model={"d_model": 128, "d_mlp": 512, "max_loops": 16},
                      train={"batch_size": 128, "lr": 1e-3, "loss_on": "every"}),
    "arithmetic": Preset(Arithmetic(modulus=7, steps=8), steps=8000, minutes="not yet trained; about 15 per kind"),
    "pointer": Preset(Pointer(keys=8, hops=6, min_keys=2, min_hops=1), steps=20_000, minutes="not yet trained; hours",
                      model={"d_model": 128, "d_mlp": 512}, train={"batch_size": 64, "lr": 1e-3}),
    "text": Preset(Text(length=128, vocab=2048), steps=40_000, minutes="for a GPU; hours",
                   train={"batch_size": 64, "lr": 1e-3}),
}
