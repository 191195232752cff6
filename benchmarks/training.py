"""How fast training runs, against the rate at which this machine multiplies matrices.

    python -m benchmarks.training             # some minutes on one core; writes docs/training_speed.md

For each preset one optimiser step is timed as its recipe has it (bfloat16 products and compiled blocks where the
machine can, masked positions unembedded) and as plain PyTorch has it (float32, eager, the whole output,
`hooks.model.diffusion.nelbo`), in alternating rounds. FLOPs are counted from the configuration
(`studies.training.flops`); the matrix rate is the best that torch reaches on the products of that model's layers, in
the same precision, on as many threads.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Estimate, alternate, compare
from hooks.model.diffusion import antithetic_t, corrupt, nelbo
from hooks.writing import written_whole
from studies.training.flops import training_flops
from studies.training.machine import fastest
from studies.training.presets import PRESETS
from studies.training.run import TrainConfig, TrainingRun
from studies.training.step import World

SIZES = ("automaton", "sudoku6", "pointer", "text")
N_LOOPS = 4


@dataclass(frozen=True)
class Rate:
    """One preset's training, measured."""

    preset: str
    width: int
    positions: int            # per step: batch × sequence
    tokens_per_second: dict[str, float]
    gflops: dict[str, float]  # counted floating-point operations per second
    matrix: dict[str, float]  # the machine's matrix rate in that precision
    data_share: float         # of a step of the recipe spent making examples
    speedup: Estimate         # plain step ÷ the recipe's


def matrix_rate(width: int, hidden: int, positions: int, dtype: torch.dtype, *, seconds: float = 0.4) -> float:
    """The best rate in GFLOP/s over the forward products of a layer: [positions, in] × [in, out]."""
    best = 0.0
    for inner, outer in ((width, 3 * width), (width, hidden), (hidden, width)):
        a, b = torch.randn(positions, inner).to(dtype), torch.randn(inner, outer).to(dtype)
        for _ in range(3):
            a @ b
        start, runs = time.process_time(), 0
        while time.process_time() - start < seconds:
            a @ b
            runs += 1
        best = max(best, 2 * positions * inner * outer * runs / (time.process_time() - start) / 1e9)
    return best


def plain_step(run: TrainingRun) -> Callable[[], None]:
    """A training step as one would first write it."""
    task, model, config = run.task, run.model, run.config

    def step() -> None:
        generator = torch.Generator().manual_seed(0)
        batch = task.sample(config.batch_size, seed=0)
        t = antithetic_t(config.batch_size, generator=generator)
        noised = corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)
        loss = nelbo(model(noised, N_LOOPS, t=t), batch.tokens, noised, t, task.mask_token_id, free=batch.free)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        run.optimizer.step()

    return step


def fixed_loops(run: TrainingRun) -> TrainingRun:
    """``run`` with every step at N_LOOPS loops."""
    weights = torch.zeros(run.model.config.max_loops)
    weights[N_LOOPS - 1] = 1
    run.loop_weights = weights
    return run


def measure(preset: str, *, rounds: int) -> Rate:
    """Time the preset's LoopMDM."""
    with tempfile.TemporaryDirectory() as folder:
        recipe: TrainConfig = PRESETS[preset].train_config("loop", 0, out=folder)
        fast = fixed_loops(TrainingRun(recipe, World()))
        plain = fixed_loops(TrainingRun(PRESETS[preset].train_config("loop", 0, out=folder, precision="fp32",
                                                                     compile=False), World()))
        times = alternate({"recipe": fast.step_once, "plain": plain_step(plain)}, rounds=rounds)
    positions = recipe.batch_size * recipe.task.seq_len
    flops = recipe.batch_size * training_flops(fast.model.config, seq_len=recipe.task.seq_len, n_loops=N_LOOPS)
    median = {name: float(torch.tensor(values).median()) for name, values in times.items()}
    start = time.process_time()
    for seed in range(10):
        recipe.task.sample(recipe.batch_size, seed=seed)
    data = (time.process_time() - start) / 10
    width, hidden = fast.model.config.d_model, fast.model.config.d_mlp
    matrix = {"recipe": matrix_rate(width, hidden, positions, _dtype(recipe)),
              "plain": matrix_rate(width, hidden, positions, torch.float32)}
    return Rate(preset, width, positions, {name: positions / value for name, value in median.items()},
                {name: flops / value / 1e9 for name, value in median.items()}, matrix, data / median["recipe"],
                compare(times, "plain", "recipe"))


def table(rates: list[Rate], products: str) -> str:
    """Markdown, one row per preset; ``products`` is the precision of the recipe's."""
    rows = [f"| preset | width | positions per step | recipe: tokens/s | GFLOP/s | of the {products} matrix rate | "
            "plain PyTorch: tokens/s | GFLOP/s | of the float32 matrix rate | plain ÷ recipe, time | data |",
            "|---" * 11 + "|"]
    for r in rates:
        cells = [f"{r.tokens_per_second[k]:,.0f} | {r.gflops[k]:.0f} | {r.gflops[k] / r.matrix[k]:.0%}"
                 for k in ("recipe", "plain")]
        rows.append(f"| {r.preset} | {r.width} | {r.positions:,} | {' | '.join(cells)} | {r.speedup} | "
                    f"{r.data_share:.1%} |")
    return "\n".join(rows)


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="steps timed of either kind")
    parser.add_argument("--presets", nargs="+", default=list(SIZES), choices=sorted(PRESETS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)   # two runs of one thread each are faster than one of two
    rates, recipe = [], fastest("cpu")
    products = "bfloat16" if recipe.precision == "bf16" else "float32"
    print(*recipe.notes, sep="\n", end="\n" if recipe.notes else "")
    for preset in options.presets:
        rates.append(measure(preset, rounds=options.rounds))
        print(table(rates[-1:], products).splitlines()[-1], flush=True)
    text = "\n\n".join([
        "# How fast training runs",
        f"Written by `python -m benchmarks.training`: one step of the LoopMDM at {N_LOOPS} loops, one thread "
        f"({platform.machine()}, torch {torch.__version__}), medians of processor time over {options.rounds} "
        f"alternating rounds. *Recipe*: {products} products, {'compiled' if recipe.compile else 'uncompiled'} blocks, "
        "only masked positions unembedded. *Plain PyTorch*: float32, eager, every position unembedded. *Matrix rate*: "
        "the best that torch reaches on the products of the model's layers in that precision. *Data*: share of the "
        "recipe's step spent making examples.", table(rates, products)])
    with written_whole(Path(__file__).parents[1] / "docs" / "training_speed.md") as temporary:
        temporary.write_text(text + "\n")


if __name__ == "__main__":
    main()


__all__ = ["Rate", "main", "matrix_rate", "measure", "table"]
