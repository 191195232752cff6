"""Training: exact resume, the FLOP count against a profiler, the triplet's budgets, the zoo."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from hooks import HookedLoopMDM, LoopMDMConfig
from studies import zoo
from studies.flops import forward_flops, mean_loops, training_flops
from studies.presets import PRESETS
from studies.tasks import Automaton
from studies.training import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
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


_KILLABLE = """
import sys
from tests.test_training import tiny
from studies.training import train
train(tiny(__import__("pathlib").Path(sys.argv[1]), eval_every=2), progress=False)
print("done")
"""


@pytest.mark.slow
def test_sigkill_at_a_random_moment_and_resume_gives_the_uninterrupted_weights(tmp_path):
    whole = train(tiny(tmp_path / "whole", eval_every=2), progress=False)
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while kills < 3:
        process = subprocess.Popen([sys.executable, "-c", _KILLABLE, str(out)], env=environment, cwd=ROOT,
                                   stdout=subprocess.DEVNULL)
        before = _checkpoint_time(out)
        while _checkpoint_time(out) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 1, "the run finished before it could be killed"
    resumed = train(tiny(out, eval_every=2), progress=False)
    assert same(weights(whole.model), weights(resumed.model))


def _checkpoint_time(out: Path) -> int | None:
    path = out / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else None


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
