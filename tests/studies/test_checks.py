"""No script starts with settings that make no sense: refused on the command line, before anything is computed."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from hooks import HookedLoopMDM
from probes import stage_test
from studies import zoo
from studies.checks import at_least, noise_level
from studies.stage_test import StageTest
from tests.small_zoo import make_zoo

ROOT = Path(__file__).resolve().parents[2]
BAD_LEVELS = ("nan", "0", "-1", "7", "1.0001", "inf", "-inf")


def scripts() -> dict[str, type]:
    """Every script of studies/ and the type of its settings: what ``tyro.cli`` is given."""
    found: dict[str, type] = {}
    for path in sorted((ROOT / "studies").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tyro.cli":
                module = importlib.import_module(f"studies.{path.stem}")
                found[path.stem] = getattr(module, ast.unparse(node.args[0]))
    return found


SCRIPTS = scripts()


def refusal(script: str, arguments: list[str], capsys: Any) -> str:
    """What the command line says when it refuses; parsing comes before `main`, so that nothing was computed."""
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(SCRIPTS[script], args=arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    return " ".join((said.out + said.err).replace("│", " ").split())


def test_the_scripts_are_found():
    assert {"stage_test", "claims", "ablations", "length_generalization", "pretrain", "readme"} <= set(SCRIPTS)


@pytest.mark.parametrize("level", BAD_LEVELS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_a_noise_level_that_is_none(script, level, capsys):
    said = refusal(script, ["--t", level], capsys)
    if "t" in SCRIPTS[script].__dataclass_fields__:
        assert "above 0 and at most 1, not" in said
    else:
        assert "Unrecognized options: --t" in said


def test_the_stage_test_takes_noise_levels():
    assert tyro.cli(StageTest, args=["--t", "1", "0.5", "1e-3"]).t == (1, 0.5, 1e-3)


@pytest.mark.parametrize(("script", "arguments"), [
    ("stage_test", ["--per-level", "7"]), ("stage_test", ["--workers", "0"]), ("stage_test", ["--untrained", "-1"]),
    ("claims", ["--examples", "0"]), ("claims", ["--few", "0"]),
    ("ablations", ["--examples", "0"]),
    ("length_generalization", ["--examples", "0"]), ("length_generalization", ["--rows", "1", "8"]),
    ("length_generalization", ["--loops", "4", "0"]),
])
def test_counts_that_leave_nothing_to_measure_are_refused_by_name(script, arguments, capsys):
    said = refusal(script, arguments, capsys)
    assert f"{arguments[0].removeprefix('--').replace('-', '_')} must be at least" in said


@pytest.mark.parametrize("changes", [{"rows": ()}, {"loops": ()}])
def test_more_rows_needs_rows_and_loops(changes):
    with pytest.raises(ValueError, match="at least one number each"):
        SCRIPTS["length_generalization"](**changes)


@pytest.mark.parametrize("level", [float(level) for level in BAD_LEVELS])
def test_the_library_refuses_such_levels_too_and_runs_no_model(level, tmp_path, monkeypatch):
    model = zoo.triplet("automaton", "", make_zoo(tmp_path))["loop"].model
    monkeypatch.setattr(HookedLoopMDM, "enter", None)
    tokens = torch.zeros(8, model.config.max_seq_len, dtype=torch.long)
    with pytest.raises(ValueError, match="lies in"):
        stage_test(model, tokens, targets=tokens, scored=tokens == 0, t=level)


@pytest.mark.parametrize("script", ["stage_test", "claims", "ablations", "length_generalization", "calibrate",
                                    "recipe", "choices"])
def test_an_unwritable_folder_is_found_out_before_the_computation(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "results").write_text("a file, where a folder should be")
    settings = SCRIPTS[script](results=tmp_path / "results", **({"zoo": make_zoo(tmp_path / "zoo")} if script in (
        "stage_test", "claims", "ablations", "length_generalization") else {}))
    monkeypatch.setattr(HookedLoopMDM, "forward", None)
    assert importlib.import_module(f"studies.{script}").main(settings) == 2
    assert "nothing can be written to" in capsys.readouterr().err


def test_the_checks_name_what_is_wrong():
    noise_level(1.0)
    at_least(2, loops=None, examples=2)
    with pytest.raises(ValueError, match="not nan"):
        noise_level(float("nan"))
    with pytest.raises(ValueError, match="examples must be at least 2, not 1"):
        at_least(2, loops=None, examples=1)
