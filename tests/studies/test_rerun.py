"""The headline study end to end on a tiny triplet, and the rules of its verdict."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hooks import HookedLoopMDM
from probes.cycles import own_loops
from probes.intervals import Interval, NotDefined, Spread
from studies import readme, rerun, zoo
from studies.questions.stages import judge as rerun_verdict
from studies.questions.stages.operation import Operation, Setting
from studies.results import read_results, write_results
from studies.training.run import train
from tests.small import uniform_attention
from tests.studies.test_training import tiny

ROOT = Path(__file__).resolve().parents[2]


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
    return rerun.main(rerun.Rerun(zoo=zoo_folder, results=results, examples=40, untrained=3, **changes))


def altered(triplets: Path, folder: Path, change: Callable[[str, HookedLoopMDM], HookedLoopMDM]) -> Path:
    """A zoo of one triplet, each model exchanged for what ``change`` makes of it; the cards stay."""
    for kind, entry in zoo.triplet("automaton", "", triplets).items():
        path = folder / entry.name
        change(kind, entry.model).save_pretrained(path)
        (path / "card.json").write_text((entry.path / "card.json").read_text())
    return folder


def test_the_study_writes_a_verdict_measurements_and_a_report(triplets, tmp_path, capsys):
    assert ask(triplets, tmp_path) == 0
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "rerun-automaton")
    assert results.verdict["operation"]["words"] in printed
    rows = {row["key"]: row for row in results.verdict["table"]}
    assert {"ratio", "within", "between", "variance_layer", "frozen", "lost", "twin", "probe_slope"} <= set(rows)
    for row in rows.values():
        for subject in ("loop", "control", "untrained"):
            if subject in row:
                assert row[subject]["low"] <= row[subject]["value"] + 1e-9
                assert row[subject]["value"] <= row[subject]["high"] + 1e-9
    assert set(results.verdict["seeds"]) == {"first", "s1"}
    assert "Over 2 training runs" in printed
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
    for word in ("--task", "--examples", "--untrained", "smallest effect", "verdict"):
        assert word in done.stdout


def test_the_untrained_column_is_the_spread_of_initialisations(triplets, tmp_path):
    from probes import stages

    ask(triplets, tmp_path, variants=("",), seed=5)
    verdict = read_results(tmp_path / "rerun-automaton").verdict
    (row,) = [row for row in verdict["table"] if row["key"] == "ratio"]
    entry = zoo.load(triplets / "automaton-loop")
    batch = entry.task.sample(40, seed=5, split="test")
    noised = batch.tokens.masked_fill(batch.free, entry.task.mask_token_id)
    ratios = []
    for seed in (5, 6, 7):
        model = HookedLoopMDM(entry.model.config)
        model.reset_parameters(torch.Generator().manual_seed(seed))
        distances = stages.head_distances(stages.pattern_gram(
            model, noised, own_loops(model.topology(verdict["setting"]["n_loops"])), t=1.0))
        ratios.append(stages.same_layer_distance(distances).mean() / stages.other_layer_distance(distances).mean())
    assert row["untrained"]["each"] == pytest.approx(ratios)
    assert row["untrained"] == {"value": pytest.approx(np.mean(ratios)), "low": min(row["untrained"]["each"]),
                                "high": max(row["untrained"]["each"]), "each": row["untrained"]["each"]}
    assert verdict["subjects"]["untrained"] == "3 untrained LoopMDMs"
    assert len({*ratios}) == 3


# ------------------------------------------------------------------------------------------ words and decisions


def interval(value: float, width: float = 0.01) -> Interval:
    return Interval(value, value - width, value + width)


def planted(**changes: Interval | NotDefined) -> tuple[Operation, Operation]:
    """Measurements that advance, with a trained ratio amid untrained ones, but for ``changes``."""
    values = {"ratio": interval(0.5), "control": interval(1.0), "untrained": Spread.of([0.4, 0.6, 0.7]),
              "slope": interval(0.8), "gain": interval(0.3), **changes}
    operation, content = Operation(), Operation()
    operation.add("ratio", "ratio", "", loop=values["ratio"], control=values["control"], untrained=values["untrained"])
    operation.add("lost", "accuracy lost by freezing", "", loop=interval(0.1), control=interval(0.2))
    content.add("probe_slope", "slope", "", loop=values["slope"])
    content.add("accuracy_gain", "gain", "", loop=values["gain"])
    return operation, content


@pytest.fixture(scope="module")
def setting(triplets) -> Setting:
    return Setting.draw(zoo.triplet("automaton", "", triplets), n_examples=4, t=1.0, seed=0, n_untrained=3)


ROUNDING = Interval(4e-16, 4e-16, 4e-16)


@pytest.mark.parametrize(("slope", "gain", "decision"), [
    (interval(0.8), interval(0.3), "advances"),
    (ROUNDING, interval(0.3), "does not advance"),            # above 0, and nothing
    (interval(0.8), ROUNDING, "does not advance"),
    (Interval(0.0199, 0.0198, 0.0199), interval(0.3), "does not advance"),   # 1% of two free rows is 0.02
    (Interval(0.021, 0.02, 0.022), interval(0.3), "advances"),
    (interval(0.8), Interval(0.009, 0.008, 0.0099), "does not advance"),
    (interval(0.8), interval(0.01), "undecided"),             # the smallest effect lies within the interval
    (interval(0.02), interval(0.3), "undecided"),
    (interval(-0.8), interval(0.3), "does not advance"),
    (NotDefined("of a reason"), interval(0.3), "undecided"),
])
def test_the_content_is_decided_by_whole_intervals_and_a_smallest_effect(setting, slope, gain, decision):
    verdict = rerun_verdict.judge(setting, *planted(slope=slope, gain=gain))
    assert verdict["content"]["decision"] == decision
    assert ("The content advances" in verdict["verdict"]) == (decision == "advances")
    assert ("The content does not advance" in verdict["verdict"]) == (decision == "does not advance")
    assert "at least 0.02 rows per loop (1% of 2) and 0.01 of accuracy" in verdict["content"]["words"]
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize(("ratio", "control", "untrained"), [
    (0.1, 1.0, [0.7, 0.8]), (0.5, 1.0, [0.4, 0.6]), (0.9, 1.0, [0.4, 0.6]), (1.2, 1.0, [0.9, 1.1]), (0.1, 0.1, [1, 2])])
def test_no_ratio_of_distances_decides_the_operation(setting, ratio, control, untrained):
    verdict = rerun_verdict.judge(setting, *planted(ratio=interval(ratio), control=interval(control),
                                                    untrained=Spread.of(untrained)))
    assert verdict["operation"]["decision"] == "open"
    assert "is left open" in verdict["verdict"]
    assert "is left open" in verdict["conclusion"]
    assert not re.search(r"operation repeats|re-runs|more alike than", verdict["verdict"] + verdict["conclusion"])


@pytest.mark.parametrize(("ratio", "words"), [
    (0.3, "lies below all of them"), (0.5, "within that spread (lower ones: 1 of 3)"), (0.8, "above all of them"),
    (0.405, "within that spread (lower ones: 1 of 3)")])
def test_the_trained_ratio_is_placed_in_the_spread_of_untrained_ones(setting, ratio, words):
    told = rerun_verdict.judge(setting, *planted(ratio=interval(ratio)))["operation"]["words"]
    assert words in told
    assert "it is 0.400 to 0.700" in told
    assert "3 of the 3 lie below 1 and below the deep twin's interval: shared weights alone" in told


def test_the_words_on_the_old_rule_count_what_they_say(setting):
    told = rerun_verdict.judge(setting, *planted(control=interval(0.65)))["operation"]["words"]
    assert "2 of the 3 lie below" in told
    told = rerun_verdict.judge(setting, *planted(untrained=Spread.of([1.1, 1.2])))["operation"]["words"]
    assert "0 of the 2 lie below 1 and below the deep twin's interval." in told
    assert "shared weights alone" not in told


# ------------------------------------------------------------------------------------------ what has no value


def one_looped_layer(kind: str, model: HookedLoopMDM) -> HookedLoopMDM:
    """A triplet whose LoopMDM and twin have one mid layer."""
    return model if kind == "deep" else HookedLoopMDM(replace(model.config, n_loop_layers=1))


@pytest.mark.parametrize(("change", "reason"), [
    (one_looped_layer, "one layer is looped"),
    (lambda _, model: uniform_attention(model), "attention patterns of different layers do not differ")])
def test_one_looped_layer_and_uniform_attention_say_why_there_is_no_ratio(triplets, tmp_path, capsys, change, reason):
    models = altered(triplets, tmp_path / "zoo", change)
    assert ask(models, tmp_path, variants=("",)) == 0
    printed = capsys.readouterr().out
    verdict = read_results(tmp_path / "rerun-automaton").verdict
    (row,) = [row for row in verdict["table"] if row["key"] == "ratio"]
    assert reason in row["loop"]["undefined"]
    html = (tmp_path / "rerun-automaton" / "report.html").read_text().partition("<h2>Accuracy over loops")[0]
    block = readme.verdict_block(verdict)
    for text in (printed, html, block, verdict["operation"]["words"]):
        assert f"not defined because {row['loop']['undefined']}" in text
        assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    (same,) = [row for row in verdict["table"] if row["key"] == "within"]
    assert np.isfinite(same["loop"]["value"]), "what is defined is told"


def test_a_sparse_mask_leaves_no_gaps_in_the_numbers(triplets, tmp_path):
    """At a low noise level some examples have no masked position, and so no signature."""
    assert ask(triplets, tmp_path, variants=("",), t=0.05) == 0
    results = read_results(tmp_path / "rerun-automaton")
    rows = {row["key"]: row for row in results.verdict["table"]}
    assert "value" in rows["variance_layer"]["loop"]
    assert "value" in rows["twin"]["loop"]
    assert np.isfinite(results.datasets["profile"].to_dataarray()).all(), "means over the examples that have one"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float64("nan")])
def test_a_verdict_without_a_number_is_not_written(tmp_path, bad):
    verdict = {"table": [{"loop": {"value": 1.0}}, {"loop": {"value": bad}}], "ends": (0.0, bad)}
    with pytest.raises(ValueError, match=r"at table\[1\]\.loop\.value, ends\[1\]"):
        write_results(tmp_path / "study", study="stages", verdict=verdict, datasets={}, html="")
    assert not list(tmp_path.iterdir())


def test_results_folders_appear_whole_or_not_at_all(triplets, tmp_path, monkeypatch):
    ask(triplets, tmp_path, variants=("",))
    before = (tmp_path / "rerun-automaton" / "verdict.json").read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("xarray.Dataset.to_netcdf", fail)
    with pytest.raises(OSError, match="disk full"):
        ask(triplets, tmp_path, variants=("",), seed=1)
    assert (tmp_path / "rerun-automaton" / "verdict.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rerun-automaton"]


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


def test_what_is_bundled_decides_nothing_on_the_operation():
    """No bundled page says what no statistic here can show."""
    from studies.results import RESULTS

    verdict = read_results(RESULTS / "rerun-automaton").verdict
    assert verdict["operation"]["decision"] == "open"
    (row,) = [row for row in verdict["table"] if row["key"] == "ratio"]
    assert len(row["untrained"]["each"]) >= 8
    pages = [RESULTS / "rerun-automaton" / "verdict.json", RESULTS / "rerun-automaton" / "report.html",
             ROOT / "README.md"]
    for page in pages:
        assert not re.search(r"operation repeats|more alike than shared weights|same operation to new content",
                             page.read_text()), page
