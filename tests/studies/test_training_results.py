"""What a training run hands on: averaged weights, metrics of these weights, the same FLOPs for every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hooks import HookedLoopMDM
from studies import zoo
from studies.tasks import Automaton
from studies.training.evaluation import held_out
from studies.training.flops import training_flops
from studies.training.presets import PRESETS
from studies.training.run import TrainConfig, TrainResult, train

TASK = Automaton(rule=90, width=5, rows=3)
STEPS, BATCH, EXAMPLES = 10, 4, 8


def config_of(out: Path, **changes: Any) -> TrainConfig:
    """A run of about ten steps whose average is far from its last weights."""
    base = TrainConfig(task=TASK, model={"d_model": 16, "n_heads": 2, "d_mlp": 32, "max_loops": 3}, batch_size=BATCH,
                       warmup_steps=1, eval_every=4, eval_examples=EXAMPLES, lr=3e-2, ema_decay=0.9, out=str(out),
                       threads=1)
    flops = training_flops(base.model_config(), seq_len=TASK.seq_len, n_loops=2)
    return replace(base, **{"budget_flops": STEPS * BATCH * flops, **changes})


def weights_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(averaged, last) weights by name, from the checkpoint of a run."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    last = state["model"]
    return dict(zip(last, state["ema"], strict=True)), last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    config = config_of(tmp_path_factory.mktemp("run"))
    return config, train(config, progress=False)


def test_the_model_of_a_result_has_the_averaged_weights(run: tuple[TrainConfig, TrainResult]) -> None:
    config, result = run
    averaged, last = weights_of(Path(config.out))
    assert not result.model.training
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, averaged[name]), name
        assert not torch.allclose(last[name], averaged[name], rtol=1e-3), f"{name}: the average is the last weight"


def test_metrics_and_card_are_those_of_the_averaged_weights(run: tuple[TrainConfig, TrainResult],
                                                            tmp_path: Path) -> None:
    config, result = run
    raw = HookedLoopMDM(result.model.config).eval()
    raw.load_state_dict(weights_of(Path(config.out))[1])
    expected, of_raw = (held_out(model, TASK, examples=EXAMPLES) for model in (result.model, raw))
    row = result.metrics[-1]
    assert row["step"] == result.step
    assert row["flops"] == result.flops
    assert {key: row[key] for key in expected} == expected
    assert abs(of_raw["nelbo"] - expected["nelbo"]) > 1e-3, "else this could not tell them apart"
    card = zoo.load(zoo.export(config, result, zoo=tmp_path, command="a test")).card
    assert card["metrics"] == row
    assert card["training"]["steps"] == result.step


def test_the_folder_holds_the_averaged_weights_rounded_to_half_precision_once(run: tuple[TrainConfig, TrainResult],
                                                                              tmp_path: Path) -> None:
    config, result = run
    averaged, _ = weights_of(Path(config.out))
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    stored = load_file(zoo.export(config, result, zoo=tmp_path, command="a test") / "model.safetensors")
    assert stored.keys() == averaged.keys()
    for name, value in stored.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, averaged[name].half()), name
        assert torch.equal(before[name], result.model.state_dict()[name]), "the result is left as it was"


@pytest.mark.parametrize("kind", ["loop", "twin", "deep"])
def test_every_kind_stops_with_the_step_that_spends_the_budget(tmp_path: Path, kind: str) -> None:
    """And the count is that of its own architecture, one loop for the twins."""
    config = config_of(tmp_path, kind=kind)
    result = train(config, progress=False)
    shape = result.model.config
    assert (shape.max_loops, shape.n_loop_layers) == {"loop": (3, 2), "twin": (1, 2), "deep": (1, 4)}[kind]
    longest, shortest = (BATCH * training_flops(shape, seq_len=TASK.seq_len, n_loops=s) for s in (shape.max_loops, 1))
    assert config.budget_flops <= result.flops < config.budget_flops + longest
    assert result.finished
    if kind != "loop":
        assert result.flops == pytest.approx(result.step * shortest)
    assert result.tokens == result.step * BATCH * TASK.seq_len


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_every_kind_and_seed_the_same_budget(name: str) -> None:
    preset = PRESETS[name]
    configs = [preset.train_config(kind, seed) for kind in preset.kinds for seed in (0, 1)]
    assert len({config.budget_flops for config in configs}) == 1
    assert len({config.batch_size for config in configs}) == 1
    assert {(config.kind, config.seed) for config in configs} == {(k, s) for k in preset.kinds for s in (0, 1)}


def test_placements_differ_in_where_two_of_twelve_layers_are_looped_and_spend_the_same() -> None:
    shapes = {}
    for name, preset in PRESETS.items():
        if name.startswith("paper-shape"):
            config = preset.train_config("loop", 0)
            model = config.model_config()
            shapes[name] = (model.n_head_layers, model.n_loop_layers, model.n_tail_layers)
            assert (model.n_layers, model.max_loops, model.time_conditioning) == (12, 12, "t")
            assert config.budget_flops == pytest.approx(PRESETS["paper-shape"].train_config("loop", 0).budget_flops)
            assert (config.loops_drawn, config.masks) == ("growth", "exact")
    assert shapes == {"paper-shape": (1, 2, 9), "paper-shape-first": (0, 2, 10), "paper-shape-middle": (5, 2, 5),
                      "paper-shape-last": (10, 2, 0)}
    assert len({preset.entry("loop", 0) for preset in PRESETS.values()}) == len(PRESETS), "a folder each"


def test_ablations_spend_what_their_base_spends() -> None:
    budgets = {name: preset.train_config("loop", 0).budget_flops for name, preset in PRESETS.items()
               if name.startswith("ablation-")}
    assert len(budgets) > 10
    assert set(budgets.values()) == {budgets["ablation-base"]}
