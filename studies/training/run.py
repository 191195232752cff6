"""The training loop: one model, one seed, a budget of FLOPs, exact resume (the gradient: `step`).

Everything random at step n (examples, noise levels, masks, loop count) comes from a
generator seeded by (seed, n), so that a run killed at any moment and resumed from its last
checkpoint ends in the same weights, bit for bit, as one that was never interrupted (on the
same machine with the same number of threads: sums depend on how they are shared out).

    result = train(TrainConfig(task=Automaton(), kind="loop", budget_flops=1e13, out="runs/a"))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.model.diffusion import NoiseLevels
from hooks.writing import written_whole
from studies.tasks import Automaton, Task
from studies.training.draws import (
    GROWN_AT,
    Curriculum,
    LoopsDrawn,
    Masks,
    Schedule,
    draw_examples,
    draw_masks,
    loop_weights,
    rate,
)
from studies.training.evaluation import held_out, idle_loops
from studies.training.flops import mean_loops, training_flops
from studies.training.machine import Precision
from studies.training.step import LossOn, TrainingStep, World, join

Kind = Literal["loop", "twin", "deep"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    task: Task = field(default_factory=Automaton)  # what to learn, with its difficulty
    kind: Kind = "loop"              # loop; twin: unlooped, equal parameters; deep: unlooped, equal per-step compute
    model: dict[str, Any] = field(default_factory=dict)  # LoopMDMConfig fields that differ from the task's defaults
    seed: int = 0
    budget_flops: float = 3e13       # training FLOPs, counted by studies.training.flops; equal over a triplet
    batch_size: int = 32
    micro_batches: int = 1           # parts of a batch whose gradients are summed, to fit in memory
    curriculum: Curriculum = "none"  # growth: examples grow from easy ones to the task's (`Task.curriculum`) over the
    #                                  first half of the budget
    loops_drawn: LoopsDrawn = "uniform"  # S ~ U{1..S_max} (2605.26106); growth: its upper end grows over the first half
    #                                  of the budget, so that depth is paid for once one pass has learned what it can;
    #                                  equal_flops: each S as often as gives every S the same share of the FLOPs
    masks: Masks = "bernoulli"       # each free token masked for itself (2406.07524), or an exact number of them, which
    #                                  is the same NELBO with less noise (`hooks.model.diffusion.exact_t`)
    noise_levels: NoiseLevels = "uniform"  # or bell: middle noise levels more often (after 2605.13026)
    lr: float = 2e-3                 # peak
    lr_of_kind: dict[str, float] = field(default_factory=dict)  # peak of a kind that learns best with another
    #                                  one: a comparison of kinds may else be one of learning rates (as in 2610.06833)
    schedule: Schedule = "cosine"    # after warm-up, to a tenth of the peak over the budget; wsd: in its last part
    decay_share: float = 0.2         # of the budget, in which wsd decays (2404.06395)
    warmup_steps: int = 200
    weight_decay: float = 0.01       # on matrices only
    ema_decay: float = 0.999         # of the weights that are evaluated and saved
    grad_clip: float = 1.0
    loss_on: LossOn = "last"         # the last loop's output, or every loop's, weighted by loop
    precision: Precision = "fp32"    # of matrix products; weights, sums and the residual stream stay in float32
    compile: bool = False            # torch.compile the blocks; needs a C++ compiler on a CPU
    eval_every: int = 250            # steps between evaluations and checkpoints
    eval_examples: int = 256
    time_budget_s: float | None = None  # stop, with a checkpoint, after so many seconds of this call
    out: str = "runs/run"            # folder of checkpoint and metrics
    device: str = "cpu"
    threads: int | None = None       # torch's intra-op threads on CPU; None leaves them

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batches {self.micro_batches}.")
        for name, allowed in (("kind", Kind), ("curriculum", Curriculum), ("loops_drawn", LoopsDrawn),
                              ("masks", Masks), ("loss_on", LossOn), ("noise_levels", NoiseLevels),
                              ("schedule", Schedule), ("precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}.")
        if self.curriculum == "growth" and not self.task.has_curriculum:
            raise ValueError(f"task {self.task.name!r} has no curriculum: curriculum must be 'none'.")
        if unknown := sorted(set(self.lr_of_kind) - set(get_args(Kind))):
            raise ValueError(f"lr_of_kind names {unknown}; kinds are {', '.join(get_args(Kind))}.")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must be above 0 and at most 1, not {self.decay_share}.")

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of this kind."""
        return self.lr_of_kind.get(self.kind, self.lr)

    def model_config(self) -> LoopMDMConfig:
        """The architecture of this kind: the looped one, or its unlooped twin or deep twin."""
        base = LoopMDMConfig(vocab_size=self.task.vocab_size, mask_token_id=self.task.mask_token_id,
                             max_seq_len=self.task.seq_len, **{**self.task.model_defaults(), **self.model})
        if self.kind == "loop":
            return base
        layers = base.n_loop_layers * (1 if self.kind == "twin" else mean_loops(base))
        return replace(base, n_loop_layers=round(layers), max_loops=1, loop_embedding="none")


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves: the EMA model and how far it came."""

    model: HookedLoopMDM
    step: int
    flops: float
    finished: bool
    seconds: float     # of training, over all calls
    tokens: int
    metrics: list[dict[str, float]]


def train(config: TrainConfig, *, resume: bool = True, progress: bool = True,
          on_eval: Callable[[dict[str, float]], None] | None = None) -> TrainResult:
    """Train until the FLOP budget or the time budget is spent; resume from ``config.out`` if it holds a checkpoint.

    Raises ValueError if the checkpoint there belongs to another configuration.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    world = join()
    run = TrainingRun(config, world)
    if resume:
        run.restore()
    began, seconds_before = time.monotonic(), run.seconds
    bar = tqdm(total=1.0, initial=min(run.spent, 1.0), disable=not (progress and world.is_main),
               bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    while run.flops < config.budget_flops:
        loss = run.step_once()
        run.seconds = seconds_before + time.monotonic() - began
        bar.set_description(f"{config.task.name}-{config.kind} seed {config.seed} step {run.step} loss {loss:.3f}")
        bar.update(min(run.spent, 1.0) - bar.n)
        finished = run.flops >= config.budget_flops
        if run.step % config.eval_every == 0 or finished:
            run.note(run.evaluate(loss))
            run.save()
            idle = idle_loops(run.metrics[-1], run.model.config.max_loops)
            if idle and progress and world.is_main and run.spent >= GROWN_AT:
                bar.write(f"{config.task.name}-{config.kind} seed {config.seed} step {run.step}: {idle}.")
            if on_eval is not None:
                on_eval(run.metrics[-1])
        expired = config.time_budget_s is not None and time.monotonic() - began > config.time_budget_s
        if not finished and config.time_budget_s is not None and world.broadcast(expired):
            run.save()
            break
    bar.close()
    return TrainResult(run.ema_model(), run.step, run.flops, run.flops >= config.budget_flops, run.seconds,
                       run.step * config.batch_size * config.task.seq_len, run.metrics)


class TrainingRun:
    """The mutable state of a run: weights, their average, the optimiser, and the counters."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.task, self.world = config, config.task, world
        if config.batch_size % (config.micro_batches * world.size):
            raise ValueError(f"a batch of {config.batch_size} cannot be shared among {world.size} processes of "
                             f"{config.micro_batches} micro-batches each: change batch_size or micro_batches.")
        torch.manual_seed(config.seed)
        self.model = HookedLoopMDM(config.model_config()).to(config.device)
        self.model.train()
        self.gradient = TrainingStep(self.model, precision=config.precision, compile=config.compile,
                                     loss_on=config.loss_on, micro_batches=config.micro_batches, world=world)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                            {"params": others, "weight_decay": 0.0}],
                                           lr=config.peak_lr, betas=(0.9, 0.99))
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.step, self.flops, self.seconds = 0, 0.0, 0.0
        self.metrics: list[dict[str, float]] = []
        self.path = Path(config.out)
        self.path.mkdir(parents=True, exist_ok=True)

    def step_once(self) -> float:
        """One optimiser step; returns the loss in nats per free token."""
        config, task = self.config, self.task
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        batch = draw_examples(task, config.batch_size, config.seed * 1_000_003 + self.step,
                              curriculum=config.curriculum, spent=self.spent)
        masked = draw_masks(batch.tokens, batch.free, task.mask_token_id, masks=config.masks,
                            levels=config.noise_levels, generator=generator)
        weights = loop_weights(self.model.config, task.seq_len, config.loops_drawn, self.spent)
        n_loops = 1 + int(torch.multinomial(weights, 1, generator=generator))
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradient.backward(batch, masked.noised, masked.t, n_loops)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.flops += config.batch_size * training_flops(self.model.config, seq_len=task.seq_len, n_loops=n_loops)
        return loss

    @property
    def spent(self) -> float:
        """Share of the FLOPs budget that is spent."""
        return self.flops / self.config.budget_flops

    def _learning_rate(self) -> float:
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup_steps)
        return config.peak_lr * warm * rate(config.schedule, self.spent, config.decay_share)

    # -------------------------------------------------------------- evaluation

    def ema_model(self) -> HookedLoopMDM:
        """A model with the averaged weights, in evaluation mode."""
        model = HookedLoopMDM(self.model.config).to(self.config.device)
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self.ema, strict=True):
                parameter.copy_(average)
        return model.eval()

    def evaluate(self, loss: float) -> dict[str, float]:
        """Held-out accuracy and NELBO of the averaged weights (`studies.training.evaluation.held_out`), and of a looped
        model whether its loops are idle, as 0 or 1."""
        row: dict[str, float] = {"step": self.step, "flops": self.flops, "seconds": round(self.seconds, 1),
                                 "lr": self._learning_rate(), "train_loss": loss}
        row |= held_out(self.ema_model(), self.task, examples=self.config.eval_examples)
        if (s_max := self.model.config.max_loops) > 1:
            row["loops_idle"] = float(idle_loops(row, s_max) is not None)
        return row

    # ------------------------------------------------------------- checkpoints

    def identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes it."""
        free_to_change = {"task", "model", "out", "device", "threads", "time_budget_s", "eval_every", "eval_examples"}
        recipe = {key: value for key, value in asdict(self.config).items() if key not in free_to_change}
        return {**recipe, "task": self.task.to_dict(), "model": self.model.config.to_dict()}

    def note(self, row: dict[str, float]) -> None:
        """Keep a row of metrics, and append it to the file that a reader may follow."""
        self.metrics.append(row)
        if not self.world.is_main:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.world.is_main:
            return
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict(),
                 "step": self.step, "flops": self.flops, "seconds": self.seconds,
                 "metrics": json.dumps(self.metrics), "identity": json.dumps(self.identity(), sort_keys=True)}
        with written_whole(self.path / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def restore(self) -> None:
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        ours, theirs = json.loads(json.dumps(self.identity())), json.loads(state["identity"])
        if ours != theirs:
            changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise ValueError(f"{path} belongs to a run with another {', '.join(changed)}: give another out folder, "
                             "or start afresh with resume off.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = [average.detach() for average in state["ema"]]
        self.step, self.flops, self.seconds = state["step"], state["flops"], state["seconds"]
        self.metrics = json.loads(state["metrics"])
        if not self.world.is_main:
            return
        lines = "".join(json.dumps(row) + "\n" for row in self.metrics)  # rows after the checkpoint are run again
        with written_whole(self.path / "metrics.jsonl") as temporary:
            temporary.write_text(lines)
