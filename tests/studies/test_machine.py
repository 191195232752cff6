"""Presets choose what the machine can do, say once what it cannot, and do as they are told."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from studies import pretrain
from studies.tasks import Automaton
from studies.training import machine, presets
from studies.training.machine import fastest, has_bf16, missing_for_compile
from studies.training.presets import PRESETS, Preset
from studies.training.run import TrainResult
from studies.training.step import TrainingStep
from tests.small import small_model

TINY = Preset(Automaton(rule=90, width=5, rows=3), steps=2, time="no time", kinds=("loop", "twin"),
              model={"d_model": 16, "n_heads": 2, "d_mlp": 32, "max_loops": 2},
              train={"batch_size": 4, "eval_examples": 8, "threads": 1})


def lacking(monkeypatch: pytest.MonkeyPatch, *, bf16: bool, compiler: bool) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(machine, "missing_for_compile", lambda device: None if compiler else "there is no C++ compiler")


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),   # many servers, and AMD before Zen 4
    ({"avx2": True}, False), ({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
    ({"architecture": "arm64", "bf16": True}, True), ({"architecture": "arm64", "bf16": False, "neon": True}, False)])
def test_bfloat16_is_told_by_the_processors_instructions(capabilities, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16("cpu") is expected


@pytest.mark.parametrize("expected", [True, False])
def test_bfloat16_of_a_gpu_is_told_by_torch(expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: expected or including_emulation)
    assert has_bf16("cuda:1") is expected
    assert missing_for_compile("cuda:1") is None


def test_this_machine_answers_one_or_the_other() -> None:
    assert has_bf16("cpu") in (True, False)
    assert missing_for_compile("cpu") is None or "compile" in fastest("cpu").notes[-1]


def test_a_compiler_is_looked_for_where_torch_looks(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert missing_for_compile("cpu") == "there is no C++ compiler g++ on the PATH"
    for name in ("g++", "other-compiler"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_for_compile("cpu") is None
    monkeypatch.setenv("CXX", "other-compiler")
    assert missing_for_compile("cpu") is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_for_compile("cpu") == "there is no C++ compiler no-such-compiler on the PATH"
    monkeypatch.setenv("CXX", "g++")
    (tmp_path / "Python.h").unlink()
    assert "Python's C headers are not installed" in str(missing_for_compile("cpu"))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("precision", [None, "bf16", "fp32"])
@pytest.mark.parametrize("compile", [None, True, False])
def test_what_is_asked_for_is_kept_and_the_rest_is_what_the_machine_can(bf16, compiler, precision, compile,
                                                                        monkeypatch) -> None:
    lacking(monkeypatch, bf16=bf16, compiler=compiler)
    recipe = fastest("cpu", precision=precision, compile=compile)
    assert recipe.precision == (precision or ("bf16" if bf16 else "fp32"))
    assert recipe.compile == (compiler if compile is None else compile)
    said = [note for note in recipe.notes if "bfloat16" in note]
    assert len(said) == (not bf16 and precision != "fp32")
    assert len(recipe.notes) - len(said) == (not compiler and compile is None)
    for name in ("automaton", "ablation-one"):
        asked = {key: value for key, value in (("precision", precision), ("compile", compile)) if value is not None}
        config = PRESETS[name].train_config("loop", 0, **asked)
        assert (config.precision, config.compile) == (recipe.precision, recipe.compile)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **asked: Any) -> dict[str, dict[str, Any]]:
    """Cards by name of a run of the tiny preset, two kinds and two seeds."""
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    status = pretrain.main(pretrain.Pretrain(preset="tiny", seeds=(0, 1), zoo=tmp_path / "zoo", runs=tmp_path / "runs",
                                             threads=1, **asked))
    assert status == 0
    return {path.parent.name: json.loads(path.read_text()) for path in sorted((tmp_path / "zoo").glob("*/card.json"))}


def test_a_machine_without_either_trains_in_float32_uncompiled_and_says_so_once(monkeypatch, tmp_path, capsys) -> None:
    lacking(monkeypatch, bf16=False, compiler=False)
    cards = run(monkeypatch, tmp_path)
    said = capsys.readouterr().out
    assert said.count("no bfloat16 instructions: matrix products are in float32 (--precision bf16 asks for") == 1
    assert said.count("There is no C++ compiler: blocks are not compiled, and training is slower.") == 1
    assert list(cards) == ["automaton-loop", "automaton-loop-s1", "automaton-twin", "automaton-twin-s1"]
    for card in cards.values():
        assert (card["training"]["precision"], card["training"]["compile"]) == ("fp32", False)
        assert card["command"].endswith(" --precision fp32 --compile False")


def test_a_machine_with_both_says_nothing_and_the_card_names_what_was_asked(monkeypatch, tmp_path, capsys) -> None:
    lacking(monkeypatch, bf16=True, compiler=True)
    monkeypatch.setattr("studies.training.run.TrainingStep", lambda *args, **options: TrainingStep(
        *args, **{**options, "compile": False}))    # which is tested elsewhere, and needs the compiler
    cards = run(monkeypatch, tmp_path)
    assert "bfloat16" not in (said := capsys.readouterr().out)
    assert "compile" not in said
    for card in cards.values():
        assert (card["training"]["precision"], card["training"]["compile"]) == ("bf16", True)
        assert "--precision" not in card["command"]
        assert "--compile" not in card["command"]


def test_what_a_preset_fixes_is_no_lack_of_the_machine(monkeypatch, tmp_path, capsys) -> None:
    lacking(monkeypatch, bf16=False, compiler=False)
    fixed = {**TINY.train, "precision": "fp32", "compile": False}
    monkeypatch.setattr("tests.studies.test_machine.TINY", dataclasses.replace(TINY, train=fixed))
    cards = run(monkeypatch, tmp_path)
    assert not any(word in capsys.readouterr().out for word in ("bfloat16", "compile"))
    assert all("--precision" not in card["command"] and "--compile" not in card["command"] for card in cards.values())
    for name, preset in PRESETS.items():
        config = preset.train_config("loop", 0)
        assert (config.precision, config.compile) == ("fp32", False), name


def test_bfloat16_by_name_works_without_instructions_and_says_that_it_is_slow(monkeypatch, tmp_path, capsys) -> None:
    lacking(monkeypatch, bf16=False, compiler=True)
    cards = run(monkeypatch, tmp_path, precision="bf16", compile=False)   # (a Python warning would be an error here)
    assert capsys.readouterr().out.count("no bfloat16 instructions: --precision fp32 is likely to be faster.") == 1
    assert all(card["training"]["precision"] == "bf16" for card in cards.values())
    assert all(card["command"].endswith(" --precision bf16 --compile False") for card in cards.values())


def test_the_command_on_the_card_names_the_device(monkeypatch, tmp_path) -> None:
    """And the run is made there: the same command makes the same run again."""
    lacking(monkeypatch, bf16=True, compiler=True)
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    trained, commands = [], []
    result = TrainResult(small_model(), step=2, flops=1.0, finished=True, seconds=0.0, tokens=8, metrics=[])
    monkeypatch.setattr(pretrain, "train", lambda config: trained.append(config) or result)
    monkeypatch.setattr(pretrain, "export", lambda *args, command, **rest: commands.append(command) or tmp_path)
    for device in ("cuda", "cpu"):
        assert pretrain.main(pretrain.Pretrain(preset="tiny", kinds=("twin",), steps=5, device=device, zoo=tmp_path,
                                               runs=tmp_path)) == 0
    assert [config.device for config in trained] == ["cuda", "cpu"]
    start = "python studies/pretrain.py --preset tiny --kinds twin --seeds 0"
    assert commands == [f"{start} --device cuda --steps 5", f"{start} --steps 5"]


def test_compiling_by_name_without_a_compiler_is_refused_before_the_training(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("studies.training.step.missing_for_compile", lambda device: "there is no C++ compiler g++")
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler g\+\+: install it, or train with compile off"):
        run(monkeypatch, tmp_path, compile=True)
    with pytest.raises(RuntimeError, match="train with compile off"):
        TrainingStep(small_model(), compile=True)


def test_the_budget_of_a_preset_is_the_same_on_every_machine() -> None:
    assert TINY.train_config("loop", 0, precision="bf16", compile=True).budget_flops == TINY.train_config(
        "loop", 0, precision="fp32", compile=False).budget_flops
