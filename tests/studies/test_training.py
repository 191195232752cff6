"""Training: exact resume, the FLOP count against a profiler, the triplet's budgets, the zoo."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.model.diffusion import corrupt, nelbo
from hooks.model.layers import Block
from studies import zoo
from studies.tasks import Automaton, Batch
from studies.training import machine
from studies.training.draws import loop_weights
from studies.training.flops import forward_flops, mean_loops, training_flops
from studies.training.presets import PRESETS
from studies.training.run import TrainConfig, TrainResult, train
from studies.training.step import TrainingStep, World, training_nelbo
from tests.small import VARIANTS, small_model

ROOT = Path(__file__).resolve().parents[2]
TINY = {"d_model": 16, "n_heads": 2, "d_mlp": 32, "max_loops": 3}


def tiny(out: Path, **changes: object) -> TrainConfig:
    task = Automaton(rule=90, width=5, rows=3)
    # one thread throughout: the order of a sum, and so its last bit, depends on how many share it
    base = TrainConfig(task=task, model=TINY, batch_size=4, warmup_steps=2, eval_every=4, eval_examples=8,
                       out=str(out), threads=1)
    flops = training_flops(base.model_config(), seq_len=task.seq_len, n_loops=2)
    return replace(base, **{"budget_flops": 12 * 4 * flops, **changes})  # type: ignore[arg-type]


def weights(model: HookedLoopMDM) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(tmp_path):
    first = train(tiny(tmp_path / "a"), progress=False)
    second = train(tiny(tmp_path / "b"), progress=False)
    other = train(tiny(tmp_path / "c", seed=1), progress=False)
    assert first.step > 8
    assert same(weights(first.model), weights(second.model))
    assert not same(weights(first.model), weights(other.model))


def test_stopping_by_time_budget_and_resuming_changes_nothing(tmp_path):
    whole = train(tiny(tmp_path / "a"), progress=False)
    calls = 0
    while not (part := train(tiny(tmp_path / "b", time_budget_s=0.0), progress=False)).finished:
        calls += 1
    assert calls > 8, "each call should have made one step"
    assert same(weights(whole.model), weights(part.model))
    assert [row["step"] for row in whole.metrics] == [row["step"] for row in part.metrics]
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [row["step"] for row in part.metrics]


def killable_config(out: Path) -> TrainConfig:
    return tiny(out, eval_every=2, precision="bf16", micro_batches=2)


def killable(out: Path, *, kill_at: int | None = None) -> tuple[TrainResult, int]:
    """A run, and how many lines of studies/training/run.py it executed; at line ``kill_at`` it gets a SIGKILL."""
    lines = 0

    def traced(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal lines
        if not frame.f_code.co_filename.endswith("studies/training/run.py"):
            return None
        lines += event == "line"
        if lines == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        return train(killable_config(out), progress=False), lines
    finally:
        sys.settrace(before)


_KILLED = """
import sys
from pathlib import Path
from tests.studies.test_training import killable
killable(Path(sys.argv[1]), kill_at=int(sys.argv[2]))
"""

_KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from tests.studies.test_training import killable

def half(state, path, save=torch.save):
    save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
killable(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_sigkill_at_random_moments_and_resume_gives_the_uninterrupted_weights(tmp_path):
    whole, lines = killable(tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    moments = [rng.randrange(lines // 5, lines // 3) for _ in range(2)]   # in all, less than a whole run
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for code, arguments in [*((_KILLED, [str(moment)]) for moment in moments), (_KILLED_WHILE_SAVING, [])]:
        done = subprocess.run([sys.executable, "-c", code, str(out), *arguments], cwd=ROOT, capture_output=True,
                              text=True, env=environment, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert 0 < len((out / "metrics.jsonl").read_text().splitlines()) < len(whole.metrics)
    resumed = train(killable_config(out), progress=False)
    assert same(weights(whole.model), weights(resumed.model))
    assert [row["step"] for row in resumed.metrics] == [row["step"] for row in whole.metrics]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tiny(tmp_path), progress=False)
    with pytest.raises(ValueError, match="another lr, seed: give another out folder"):
        train(tiny(tmp_path, seed=5, lr=1e-4), progress=False)


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu"}, {"n_head_layers": 0, "n_tail_layers": 2}])
@pytest.mark.parametrize("n_loops", [1, 3])
def test_flops_agree_with_torchs_counter(changes, n_loops):
    config = LoopMDMConfig(vocab_size=7, mask_token_id=6, max_seq_len=20, d_model=32, n_heads=2, d_mlp=48, **changes)
    model = HookedLoopMDM(config)
    tokens = torch.randint(0, 7, (3, 20))
    with FlopCounterMode(display=False) as counter:
        # scaled_dot_product_attention is not counted on CPU: the explicit path is
        model.run_with_cache(tokens, n_loops, names_filter="blocks.*.attn.hook_pattern")
    assert counter.get_total_flops() == pytest.approx(3 * forward_flops(config, seq_len=20, n_loops=n_loops))


def test_the_triplet_has_equal_parameters_or_equal_compute():
    loop, twin, deep = (PRESETS["automaton"].train_config(kind, 0).model_config() for kind in ("loop", "twin", "deep"))
    count = [sum(p.numel() for p in HookedLoopMDM(c).parameters()) for c in (loop, twin)]
    assert count[0] == count[1]
    per_step = [forward_flops(loop, seq_len=96, n_loops=mean_loops(loop)), forward_flops(deep, seq_len=96, n_loops=1)]
    assert per_step[0] == pytest.approx(per_step[1], rel=0.01)
    budgets = {PRESETS["automaton"].train_config(kind, 0).budget_flops for kind in ("loop", "twin", "deep")}
    assert len(budgets) == 1


# ---------------------------------------------------------------- one step's gradient


def batch_of(task: Automaton, n: int = 8) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    batch = task.sample(n, seed=3)
    t = torch.linspace(0.2, 1.0, n)
    noised = corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=torch.Generator().manual_seed(0))
    return batch, noised, t


def gradients(model: HookedLoopMDM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_the_bound_of_masked_positions_alone_is_the_nelbo(variant):
    task = Automaton(rule=90, width=5, rows=2)
    model = small_model(**VARIANTS[variant], vocab_size=3, mask_token_id=2)
    batch, noised, t = batch_of(task)
    n_free = int(batch.free.sum())
    for n_loops in (1, 3):
        whole = nelbo(model(noised, n_loops, t=t), batch.tokens, noised, t, task.mask_token_id, free=batch.free)
        torch.testing.assert_close(training_nelbo(model, batch.tokens, noised, t, n_loops, n_free=n_free), whole)
    by_loop = [nelbo(model(noised, k, t=t), batch.tokens, noised, t, task.mask_token_id, free=batch.free)
               for k in (1, 2, 3)]
    torch.testing.assert_close(training_nelbo(model, batch.tokens, noised, t, 3, n_free=n_free, loss_on="every"),
                               (by_loop[0] + 2 * by_loop[1] + 3 * by_loop[2]) / 6)


def test_micro_batches_and_processes_sum_to_the_gradient_of_the_whole_batch():
    model = small_model(vocab_size=3, mask_token_id=2)
    batch, noised, t = batch_of(Automaton(rule=90, width=5, rows=2))
    whole_loss = TrainingStep(model).backward(batch, noised, t, 2)
    whole = gradients(model)
    for parts in ([TrainingStep(model, micro_batches=4)], [TrainingStep(model, world=World(i, 2)) for i in range(2)]):
        model.zero_grad()
        loss = 0.0
        for part in parts:   # what all_reduce sums, without it
            part._summed = lambda value: value
            loss += part.backward(batch, noised, t, 2)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4)


def test_bfloat16_is_near_float32_and_not_the_same():
    model = small_model(vocab_size=3, mask_token_id=2)
    batch, noised, t = batch_of(Automaton(rule=90, width=5, rows=2))
    exact = TrainingStep(model).backward(batch, noised, t, 2)
    model.zero_grad()
    near = TrainingStep(model, precision="bf16").backward(batch, noised, t, 2)
    assert near != exact
    assert near == pytest.approx(exact, rel=0.02)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    machine.missing_for_compile("cpu") is not None, reason=f"{machine.missing_for_compile('cpu')}: torch's own backend "
    "needs it; aot_eager, which is the same up to code generation, runs everywhere"))])
def test_compiled_blocks_give_the_same_gradients(backend, monkeypatch):
    compiled_by, backends = nn.Module.compile, []

    def with_backend(module, **options):
        backends.append(backend)
        compiled_by(module, **options, backend=backend)

    monkeypatch.setattr(Block, "compile", with_backend)
    monkeypatch.setattr("studies.training.step.missing_for_compile", lambda device: None)
    batch, noised, t = batch_of(Automaton(rule=90, width=5, rows=2))
    plain, compiled = small_model(vocab_size=3, mask_token_id=2), small_model(vocab_size=3, mask_token_id=2)
    assert TrainingStep(compiled, compile=True).backward(batch, noised, t, 3) == pytest.approx(
        TrainingStep(plain).backward(batch, noised, t, 3), rel=1e-5)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], atol=1e-5, rtol=1e-3)
    assert backends == [backend] * len(compiled.blocks)
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)


def test_compiling_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler no-such-compiler on the PATH: install it"):
        TrainingStep(small_model(), compile=True)


def test_loops_drawn_by_equal_flops_spend_the_same_on_every_number_of_loops():
    config = LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=96)
    weights = loop_weights(config, 96, "equal_flops")
    spent = [float(weights[s - 1]) * training_flops(config, seq_len=96, n_loops=s) for s in (1, 4, 8)]
    assert spent == pytest.approx([spent[0]] * 3)
    assert loop_weights(config, 96, "uniform").tolist() == [1.0] * 8


@pytest.mark.unchecked
@pytest.mark.parametrize(("changes", "message"), [
    ({"micro_batches": 3}, "batch_size 4 is not a multiple of micro_batches 3"),
    ({"precision": "fp8"}, "precision must be one of fp32, bf16, not 'fp8'"),
    ({"schedule": "steps"}, "schedule must be one of cosine, linear, constant, wsd"),
    ({"decay_share": 0.0}, "decay_share must be above 0 and at most 1"),
    ({"lr_of_kind": {"triplet": 1e-3}}, r"lr_of_kind names \['triplet'\]; kinds are loop, twin, deep"),
    ({"kind": "wide"}, "kind must be one of loop, twin, deep"),
    ({"masks": "all"}, "masks must be one of bernoulli, exact"),
    ({"noise_levels": "flat"}, "noise_levels must be one of uniform, bell"),
    ({"loops_drawn": "few"}, "loops_drawn must be one of uniform, growth, equal_flops")])
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **changes)


_PROCESSES = """
import sys
from pathlib import Path
from tests.studies.test_training import tiny
from studies.training.run import train
train(tiny(Path(sys.argv[1]), time_budget_s=600.0), progress=False)
"""


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process_does(tmp_path):
    one = train(tiny(tmp_path / "one"), progress=False)
    script = tmp_path / "script.py"
    script.write_text(_PROCESSES)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run([*launch, str(script), str(tmp_path / "two")], cwd=ROOT, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    two = train(tiny(tmp_path / "two"), progress=False)   # finished: this reads its checkpoint
    assert two.step == one.step
    for name, value in weights(two.model).items():
        torch.testing.assert_close(value, weights(one.model)[name], atol=1e-4, rtol=1e-3)


def test_loss_on_every_loop_differs_and_trains(tmp_path):
    last = train(tiny(tmp_path / "a"), progress=False)
    every = train(tiny(tmp_path / "b", loss_on="every"), progress=False)
    assert not same(weights(last.model), weights(every.model))


def test_training_lowers_the_bound(tmp_path):
    config = tiny(tmp_path, budget_flops=tiny(tmp_path).budget_flops * 40, lr=1e-2, eval_every=100,
                  task=Automaton(rule=204, width=5, rows=3))  # every row repeats the one above
    result = train(config, progress=False)
    assert result.metrics[-1]["nelbo"] < 0.8 * result.metrics[0]["nelbo"]


def test_zoo_entry_round_trip(tmp_path):
    config = tiny(tmp_path / "run")
    result = train(config, progress=False)
    folder = zoo.export(config, result, zoo=tmp_path / "zoo", command="a test")
    entry = zoo.load(folder)
    assert zoo.names(tmp_path / "zoo") == ["automaton-loop"]
    assert entry.task == config.task
    assert entry.card["training"]["flops"] == result.flops
    tokens = config.task.sample(2, seed=0).tokens
    half = {key: value.half().float() for key, value in result.model.state_dict().items()}
    result.model.load_state_dict(half)
    assert torch.equal(entry.model(tokens), result.model(tokens))
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_a_corrupted_entry_names_the_file_and_the_mismatch(tmp_path):
    config = tiny(tmp_path / "run")
    folder = zoo.export(config, train(config, progress=False), zoo=tmp_path / "zoo", command="a test")
    weights_file = folder / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        zoo.load(folder)
    weights_file.write_bytes(whole)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "task": {"name": "automaton", "width": 40}}))
    with pytest.raises(ValueError, match=r"the task in card\.json needs 3 and 320"):
        zoo.load(folder)
    (folder / "card.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a zoo entry"):
        zoo.load(folder)
