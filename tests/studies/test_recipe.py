"""The recipe: a whole training step written by hand, what is drawn when, the learning rate, and idle loops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.model.diffusion import antithetic_t, corrupt, corrupt_exactly, exact_t, nelbo
from studies.tasks import Automaton
from studies.training.draws import loop_weights, rate
from studies.training.evaluation import doubled_loops, held_out, idle_loops
from studies.training.flops import training_flops
from studies.training.run import TrainConfig, TrainingRun, train
from studies.training.step import World
from tests.small import small_model

TASK = Automaton(rule=90, width=5, rows=3)
MODEL = {"d_model": 16, "n_heads": 2, "d_mlp": 32, "max_loops": 4}


def recipe(out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(task=TASK, model=MODEL, batch_size=4, warmup_steps=3, eval_every=5, eval_examples=8, lr=1e-2,
                       weight_decay=0.1, ema_decay=0.9, grad_clip=0.5, out=str(out), threads=1)
    flops = training_flops(base.model_config(), seq_len=TASK.seq_len, n_loops=2.5)
    return replace(base, **{"budget_flops": 12 * 4 * flops, **changes})  # type: ignore[arg-type]


# -------------------------------------------------------------------- a step written by hand


class ByHand:
    """The recipe in plain PyTorch: Adam, decay, clipping, average and schedule spelled out, for any options."""

    def __init__(self, config: TrainConfig):
        self.config = config
        torch.manual_seed(config.seed)
        self.model = HookedLoopMDM(config.model_config())
        self.weights = dict(self.model.named_parameters())
        self.first = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        self.step, self.flops = 0, 0.0

    def advance(self) -> None:
        config, model = self.config, self.model
        spent = self.flops / config.budget_flops
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        batch = TASK.sample(4, seed=config.seed * 1_000_003 + self.step)
        if config.masks == "exact":
            t = exact_t(batch.free.sum(1), levels=config.noise_levels, generator=generator)
            noised = corrupt_exactly(batch.tokens, t, TASK.mask_token_id, free=batch.free, generator=generator)
        else:
            t = antithetic_t(4, levels=config.noise_levels, generator=generator)
            noised = corrupt(batch.tokens, t, TASK.mask_token_id, free=batch.free, generator=generator)
        s_max = model.config.max_loops
        top = s_max
        if config.loops_drawn == "growth":
            top = 1 + math.floor((s_max - 1) * min(1.0, 2 * spent) + 0.5)
        odds = torch.tensor([1.0] * top + [0.0] * (s_max - top))
        n_loops = 1 + int(torch.multinomial(odds, 1, generator=generator))

        total = torch.zeros(())
        for row in range(4):
            log_p = F.log_softmax(model(noised[row:row + 1], n_loops, t=t[row:row + 1])[0], -1)
            for place in range(TASK.seq_len):
                if noised[row, place] == TASK.mask_token_id:
                    total = total - log_p[place, batch.tokens[row, place]] / t[row]
        model.zero_grad()
        (total / batch.free.sum()).backward()

        if config.schedule == "wsd":
            left = min(1.0, (1 - spent) / config.decay_share)
        else:
            left = 0.5 * (1 + math.cos(math.pi * spent))
        lr = config.lr_of_kind.get(config.kind, config.lr) * min(1.0, (self.step + 1) / 3) * (0.1 + 0.9 * left)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.weights.values()))
        keep = min(0.9, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.weights.items():
                gradient = p.grad * min(1.0, 0.5 / (norm + 1e-6))
                if p.ndim >= 2:
                    p.mul_(1 - lr * 0.1)
                self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
                self.second[name] = 0.99 * self.second[name] + 0.01 * gradient.square()
                first, second = (m / (1 - beta ** (self.step + 1)) for m, beta in
                                 ((self.first[name], 0.9), (self.second[name], 0.99)))
                p.sub_(lr * first / (second.sqrt() + 1e-8))
                self.average[name] = keep * self.average[name] + (1 - keep) * p
        self.step += 1
        self.flops += 4 * training_flops(model.config, seq_len=TASK.seq_len, n_loops=n_loops)


@pytest.mark.parametrize("options", [
    {},
    {"loops_drawn": "growth", "masks": "exact"},
    {"masks": "exact", "noise_levels": "bell", "schedule": "wsd", "decay_share": 0.5},
    {"lr_of_kind": {"loop": 3e-3, "twin": 1.0}, "seed": 3, "model": {**MODEL, "input_injection": "head"}},
    {"kind": "twin", "lr_of_kind": {"twin": 3e-3}, "masks": "exact", "loops_drawn": "growth"},
], ids=["default", "growth", "bell", "rates", "twin"])
def test_steps_equal_steps_written_by_hand(tmp_path, options):
    config = recipe(tmp_path, **options)
    run, hand = TrainingRun(config, World()), ByHand(config)
    while run.flops < config.budget_flops:
        run.step_once()
        hand.advance()
        assert run.flops == hand.flops, "the FLOPs are those of the loops that ran"
    assert run.step >= 8
    for average, (name, expected) in zip(run.ema, hand.average.items(), strict=True):
        torch.testing.assert_close(average, expected, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------- what is drawn


def test_growth_reaches_s_max_at_half_of_the_budget():
    config = LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=96, max_loops=8)
    tops = [int(loop_weights(config, 96, "growth", spent).sum()) for spent in (0, 0.03, 0.04, 0.25, 0.46, 0.47, 0.5, 1)]
    assert tops == [1, 1, 2, 5, 7, 8, 8, 8], "1 + 7 · 2p, to the nearest whole number, halves up"
    weights = loop_weights(config, 96, "growth", 0.25)
    assert weights.tolist() == [1.0] * 5 + [0.0] * 3


def test_growing_and_exact_masks_resume_where_they_stopped(tmp_path):
    options = {"loops_drawn": "growth", "masks": "exact", "schedule": "wsd"}
    whole = train(recipe(tmp_path / "a", **options), progress=False)
    calls = 0
    while not (part := train(recipe(tmp_path / "b", time_budget_s=0.0, **options), progress=False)).finished:
        calls += 1
    assert calls > 8
    assert part.flops == whole.flops
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name


def test_growth_takes_more_steps_for_the_same_budget(tmp_path):
    uniform = train(recipe(tmp_path / "a"), progress=False)
    growth = train(recipe(tmp_path / "b", loops_drawn="growth"), progress=False)
    assert growth.step > uniform.step
    one_step = 4 * training_flops(growth.model.config, seq_len=TASK.seq_len, n_loops=4)
    for result in (uniform, growth):
        assert 0 <= result.flops - recipe(tmp_path).budget_flops < one_step, "over by less than its last step"


@pytest.mark.parametrize(("schedule", "expected"), [
    ("cosine", [1, 0.55, 0.1, 0.1]), ("linear", [1, 0.55, 0.1, 0.1]), ("constant", [1, 1, 1, 1]),
    ("wsd", [1, 1, 0.1, 0.1])])
def test_schedules(schedule, expected):
    assert [rate(schedule, spent, 0.2) for spent in (0, 0.5, 1, 1.3)] == pytest.approx(expected)


def test_warm_up_stable_decay_is_flat_until_it_decays():
    assert [rate("wsd", spent, 0.2) for spent in (0.1, 0.8, 0.9)] == pytest.approx([1, 1, 0.55])


# ------------------------------------------------------------------------------------- idle loops


def test_held_out_bounds_are_the_models_own(tmp_path):
    model = small_model(vocab_size=3, mask_token_id=2, max_seq_len=15, max_loops=6)
    row = held_out(model, TASK, examples=12)
    assert doubled_loops(6) == [1, 2, 4, 6]
    assert {key for key in row if key.startswith("nelbo")} == {
        "nelbo", "nelbo@1", "nelbo@2", "nelbo@4", "nelbo@6", "nelbo_line@4", "nelbo_line@6"}
    batch = TASK.sample(12, seed=0, split="test")
    generator = torch.Generator().manual_seed(1)
    t = exact_t(batch.free.sum(1), generator=generator)
    noised = corrupt_exactly(batch.tokens, t, 2, free=batch.free, generator=generator)
    with torch.no_grad():
        logits, rec = model.run_with_cache(noised, 4, names_filter="blocks.2.hook_resid_post")
        after = rec.stack("blocks.2.hook_resid_post")
        line = model.tail(after[0] + 3 * (after[1] - after[0]))
        for name, found in (("nelbo@4", logits), ("nelbo_line@4", line)):
            assert row[name] == pytest.approx(float(nelbo(found, batch.tokens, noised, t, 2, free=batch.free)))
        everything = batch.tokens.masked_fill(batch.free, 2)
        predicted = model(everything, 6, t=1.0).argmax(-1)
    assert row["exact@6"] == float(TASK.score(predicted, batch)["exact"].mean())
    assert row["nelbo"] == row["nelbo@6"]


def test_loops_that_add_one_vector_are_idle_and_their_line_is_their_state():
    model = small_model(vocab_size=3, mask_token_id=2, max_seq_len=15, max_loops=4)
    with torch.no_grad():   # mid layers whose only effect is the bias of an MLP
        for layer in (1, 2):
            model.blocks[layer].attn.out.weight.zero_()
            model.blocks[layer].mlp.down.weight.zero_()
    row = held_out(model, TASK, examples=12)
    assert row["nelbo_line@4"] == pytest.approx(row["nelbo@4"], abs=1e-5)
    assert idle_loops({**row, "nelbo@1": row["nelbo@4"] + 1}, 4) is not None, "a gain that a line gives, too"


@pytest.mark.parametrize(("row", "words"), [
    ({"nelbo@1": 1.0, "nelbo@8": 0.995, "nelbo_line@8": 2.0}, "falls by 0.005 nat, below 0.01"),
    ({"nelbo@1": 1.0, "nelbo@8": 1.2, "nelbo_line@8": 2.0}, "falls by -0.200 nat"),
    ({"nelbo@1": 1.0, "nelbo@8": 0.5, "nelbo_line@8": 0.505}, "0.005 nat below what a straight line"),
    ({"nelbo@1": 1.0, "nelbo@8": 0.5, "nelbo_line@8": 0.3}, "-0.200 nat below what a straight line"),
    ({"nelbo@1": 1.0, "nelbo@8": 0.5, "nelbo_line@8": 0.9}, None)])
def test_idle_loops_are_told(row, words):
    said = idle_loops(row, 8)
    assert said is None if words is None else words in said
    assert idle_loops(row, 1) is None


def test_two_loops_have_no_line_to_beat():
    assert idle_loops({"nelbo@1": 1.0, "nelbo@2": 0.5}, 2) is None


def test_training_stores_and_says_that_loops_are_idle(tmp_path, capsys):
    result = train(recipe(tmp_path / "a", lr=1e-9))
    assert [row["loops_idle"] for row in result.metrics] == [1.0] * len(result.metrics)
    stored = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert stored == result.metrics
    said = [line for line in capsys.readouterr().out.splitlines() if "loops are idle" in line]
    assert len(said) == sum(row["flops"] >= 0.5 * recipe(tmp_path).budget_flops for row in result.metrics)
    assert said[0].startswith("automaton-loop seed 0 step ")
    twin = train(recipe(tmp_path / "b", kind="twin", lr=1e-9))
    assert not any("loops_idle" in row or "nelbo_line@1" in row for row in twin.metrics)
    assert "idle" not in capsys.readouterr().out
