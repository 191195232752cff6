"""The headline study end to end on a tiny triplet, and the rules of its verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from probes.intervals import Interval
from studies import rerun, rerun_verdict, zoo
from studies.rerun_operation import Operation
from studies.results import read_results
from studies.training import train
from tests.test_training import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def triplets(tmp_path_factory) -> Path:
    """A zoo with two whole triplets, trained for a few steps."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, variant in ((0, ""), (1, "s1")):
        for kind in ("loop", "twin", "deep"):
            config = tiny(folder / f"run-{kind}-{seed}", kind=kind, seed=seed)
            zoo.export(config, train(config, progress=False), variant=variant, zoo=folder / "zoo", command="a test")
    return folder / "zoo"


def ask(zoo_folder: Path, results: Path, **changes: object) -> int:
    return rerun.main(rerun.Rerun(zoo=zoo_folder, results=results, examples=40, **changes))


def test_the_study_writes_a_verdict_measurements_and_a_report(triplets, tmp_path, capsys):
    assert ask(triplets, tmp_path) == 0
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "rerun-automaton")
    assert results.verdict["operation"]["words"] in printed
    rows = {row["key"]: row for row in results.verdict["table"]}
    assert {"ratio", "within", "between", "variance_layer", "frozen", "twin", "probe_slope"} <= set(rows)
    for row in rows.values():
        for subject in ("loop", "control", "untrained"):
            if subject in row:
                assert row[subject]["low"] <= row[subject]["value"] + 1e-9
                assert row[subject]["value"] <= row[subject]["high"] + 1e-9
    assert set(results.verdict["seeds"]) == {"first", "s1"}
    assert "Over 2 training seeds" in printed
    for dataset in results.datasets.values():
        for array in dataset.data_vars.values():
            assert {"long_name", "units", "definition", "source"} <= set(array.attrs)
    html = (tmp_path / "rerun-automaton" / "report.html").read_text()
    assert results.verdict["conclusion"] in html
    assert "<script src=" not in html, "the report must need no network"


def test_the_same_seed_gives_the_same_results(triplets, tmp_path):
    for name in ("a", "b"):
        ask(triplets, tmp_path / name, variants=("",))
    first, second = (read_results(tmp_path / name / "rerun-automaton") for name in ("a", "b"))
    assert first.verdict["table"] == second.verdict["table"]
    for name, dataset in first.datasets.items():
        assert dataset.identical(second.datasets[name])


def test_accuracy_over_loops_is_the_models_own(triplets, tmp_path):
    ask(triplets, tmp_path, variants=("",))
    results = read_results(tmp_path / "rerun-automaton")
    entry = zoo.load(triplets / "automaton-loop")
    batch = entry.task.sample(40, seed=0, split="test")
    noised = batch.tokens.masked_fill(batch.free, entry.task.mask_token_id)
    for n_loops in (1, 3, 5):
        cells = entry.task.score(entry.model(noised, n_loops, t=1.0).argmax(-1), batch)["cells"]
        got = results.datasets["accuracy_over_loops"].accuracy.sel(kind="loop", n_loops=n_loops)
        assert float(got) == pytest.approx(float(cells.mean()), abs=1e-6)


def test_a_missing_triplet_is_named_with_its_remedy(tmp_path, capsys):
    assert ask(tmp_path, tmp_path) == 2
    assert "train one with `python studies/pretrain.py" in capsys.readouterr().err
    assert not list(tmp_path.glob("rerun*"))


def test_help_explains_itself():
    done = subprocess.run([sys.executable, "studies/rerun.py", "--help"], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    for word in ("--task", "--examples", "negative control", "verdict"):
        assert word in done.stdout


def interval(value: float, width: float = 0.01) -> Interval:
    return Interval(value, value - width, value + width)


def planted(ratio: float, control: float, slope: float, gain: float) -> tuple[Operation, Operation]:
    operation, content = Operation(), Operation()
    operation.add("ratio", "ratio", "", "LoopMDM below 1 and below the control", loop=interval(ratio),
                  control=interval(control), untrained=interval(0.7))
    for key in ("unfrozen", "frozen"):
        operation.add(key, key, "", "–", loop=interval(0.9), control=interval(0.9))
    content.add("probe_slope", "slope", "", "above 0", loop=interval(slope))
    content.add("accuracy_gain", "gain", "", "above 0", loop=interval(gain))
    return operation, content


@pytest.mark.parametrize(("ratio", "control", "slope", "gain", "repeats", "advances"), [
    (0.5, 0.98, 0.8, 0.3, True, True),
    (0.5, 0.98, 0.0, 0.3, True, False),
    (0.97, 0.98, 0.8, 0.3, False, True),   # intervals overlap: nothing is claimed
    (0.5, 0.4, 0.8, 0.3, False, True),     # the control repeats more
    (1.0, 1.2, 0.0, 0.0, False, False),
])
def test_the_verdict_follows_from_the_intervals(triplets, ratio, control, slope, gain, repeats, advances):
    from hooks import HookedLoopMDM
    from studies.rerun_operation import Setting

    models = zoo.triplet("automaton", "", triplets)
    setting = Setting.draw(models, HookedLoopMDM(models["loop"].model.config), n_examples=4, t=1.0, seed=0)
    verdict = rerun_verdict.judge(setting, *planted(ratio, control, slope, gain))
    assert (verdict["operation"]["repeats"], verdict["content"]["advances"]) == (repeats, advances)
    assert ("The operation repeats" in verdict["verdict"]) == repeats
    assert ("The content advances" in verdict["verdict"]) == advances
    json.dumps(verdict)


def test_results_folders_appear_whole_or_not_at_all(triplets, tmp_path, monkeypatch):
    ask(triplets, tmp_path, variants=("",))
    before = (tmp_path / "rerun-automaton" / "verdict.json").read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("xarray.Dataset.to_netcdf", fail)
    with pytest.raises(OSError, match="disk full"):
        ask(triplets, tmp_path, variants=("",), seed=1)
    assert (tmp_path / "rerun-automaton" / "verdict.json").read_bytes() == before


def test_the_bundled_verdict_is_the_issue_of_the_bundled_models():
    """Guards against results that no longer belong to the weights in zoo/."""
    from studies.results import RESULTS, file_hash

    results = read_results(RESULTS / "rerun-automaton")
    for name, made in results.verdict["provenance"]["models"].items():
        assert file_hash(zoo.ZOO / name / "model.safetensors") == made["sha256"], f"{name}: run `make study` again"
    accuracy = results.datasets["accuracy_over_loops"].accuracy.sel(kind="loop")
    s_max = zoo.load(zoo.ZOO / "automaton-loop").model.config.max_loops
    assert float(accuracy.sel(n_loops=s_max)) >= 0.97
    assert float(accuracy.sel(n_loops=s_max) - accuracy.sel(n_loops=1)) >= 0.2
    assert np.isfinite(accuracy).all()
