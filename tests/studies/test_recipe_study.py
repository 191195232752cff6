"""The comparison of recipes: planted differences, what is trained and what is not trained twice, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies import recipe
from studies.questions.recipe.judge import Difference, differences
from studies.questions.recipe.measure import CHANGES, configure
from studies.questions.recipe.page import page
from studies.recipe import Recipe, main
from studies.tasks import Automaton
from studies.training.presets import PRESETS

NAMES = {change: what for change, (what, _) in CHANGES.items()}


def run(change: str, seed: int, nelbo: float, task: str = "stories", budget: float = 1e9) -> dict[str, Any]:
    return {"task": task, "change": change, "seed": seed, "budget_flops": budget, "nelbo": nelbo, "nelbo@1": nelbo + 1,
            "exact": 0.5, "loops_idle": float(change == "before"), "step": 100 + seed, "flops": budget,
            "difficulty": {"name": task, "steps": 8}, "seconds": 1}


def test_differences_are_paired_by_seed_and_budget() -> None:
    runs = [run("recipe", 0, 1.0), run("recipe", 1, 2.0), run("before", 1, 2.5), run("before", 0, 1.25),
            run("before", 2, 9.0), run("wsd", 0, 0.5, budget=2e9)]
    [found] = differences(runs)
    assert (found.change, found.by_seed) == ("before", (0.25, 0.5)), "no pair for seed 2, none at another budget"
    assert found.mean == 0.375
    assert found.interval is None
    assert found.word == "2 runs"


@pytest.mark.parametrize(("by_seed", "word"), [
    ((0.5, 0.6, 0.7), "worse"), ((-0.5, -0.6, -0.7), "better"), ((0.5, -0.4, 0.1), "undecided"),
    ((0.5,), "single run")])
def test_planted_differences_are_judged(by_seed: tuple[float, ...], word: str) -> None:
    assert Difference("stories", "before", 1e9, by_seed).word == word


def test_the_interval_is_students() -> None:
    low, high = Difference("stories", "before", 1e9, (1.0, 2.0, 3.0)).interval or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3)


def test_the_page_says_what_is_kept_and_what_is_not_known() -> None:
    seeds = range(3)
    runs = [run("recipe", s, 1.0 + s) for s in seeds] + [run("before", s, 2.0 + 1.1 * s) for s in seeds]
    runs += [run("wsd", s, 0.5 + 1.1 * s) for s in seeds] + [run("head", 1, 2.5)]
    runs += [run(change, s, 1.0 + s, task="automaton") for s in seeds for change in ("recipe",)]
    runs += [run("wsd", s, 1.6 + s * 1.1, task="automaton") for s in seeds]
    text = page(runs, NAMES)
    assert "*before* (S uniform and each token masked for itself): the recipe's choice is kept." in text
    assert "*wsd* (learning rate constant, then falling in the last fifth): differs by task." in text
    assert "*head* (the head's output injected at each loop): too few runs to judge." in text
    assert "+0.500 (single run)" in text
    assert "Not run beside the recipe so far: uniform, bernoulli, bell, embedding." in text
    assert "| stories | 1e+09 | before | 0, 1, 2 | 101 [100, 102] | 3.100 [2.000, 4.200] |" in text
    assert "| 3 of 3 |" in text


def test_changes_are_what_they_say_and_spend_the_same(tmp_path: Path) -> None:
    arms = {change: configure("stories", change, 1, steps=None, runs=tmp_path, threads=1) for change in CHANGES}
    assert len({config.budget_flops for config in arms.values()}) == 1
    assert len({config.out for config in arms.values()}) == len(arms)
    assert {config.seed for config in arms.values()} == {1}
    assert (arms["recipe"].loops_drawn, arms["recipe"].masks) == ("growth", "exact")
    assert (arms["before"].loops_drawn, arms["before"].masks) == ("uniform", "bernoulli")
    assert arms["head"].model_config().input_injection == "head"
    preset = PRESETS["stories"].train_config("loop", 1, threads=1)
    assert arms["recipe"] == replace(preset, out=str(tmp_path / "stories-loop-s1")), "the run that pretrain makes"
    shorter = configure("stories", "recipe", 1, steps=10, runs=tmp_path, threads=1)
    assert shorter.out != arms["recipe"].out
    assert shorter.budget_flops < arms["recipe"].budget_flops


def test_runs_are_made_once_and_written_with_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(PRESETS["stories"], task=Automaton(rule=90, width=5, rows=3), steps=3,
                   train={**PRESETS["stories"].train, "batch_size": 4, "eval_examples": 4},
                   model={"d_model": 16, "n_heads": 2, "d_mlp": 16, "max_loops": 2})
    monkeypatch.setitem(PRESETS, "stories", tiny)
    args = Recipe(tasks=("stories",), changes=("recipe", "head"), seeds=(0, 1), runs=tmp_path / "runs",
                  results=tmp_path / "results", threads=1)
    assert main(args) == 0
    runs = json.loads((tmp_path / "results" / "recipe.json").read_text())
    assert [(entry["change"], entry["seed"]) for entry in runs] == [
        ("recipe", 0), ("head", 0), ("recipe", 1), ("head", 1)]
    assert (tmp_path / "results" / "recipe.md").read_text() == page(runs, NAMES)
    monkeypatch.setattr(recipe, "train", lambda config: pytest.fail("what is there is not trained again"))
    assert main(args) == 0
    assert main(replace(args, train=False, changes=("wsd",))) == 0


def test_runs_are_made_on_the_device_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stop(config: Any) -> None:
        asked.append(config.device)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train", stop)
    for options in ({}, {"device": "cuda"}):
        with pytest.raises(KeyboardInterrupt):
            main(Recipe(tasks=("stories",), changes=("recipe",), seeds=(0,), results=tmp_path, **options))
    assert asked == ["cpu", "cuda"]


def test_unknown_names_and_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Recipe(tasks=("chess",), results=tmp_path)) == 2
    assert "no preset is called chess" in capsys.readouterr().err
    assert main(Recipe(changes=("luck",), results=tmp_path)) == 2
    assert "no change is called luck" in capsys.readouterr().err
    assert main(Recipe(train=False, results=tmp_path)) == 2
    assert "holds no run of the recipe itself" in capsys.readouterr().err
