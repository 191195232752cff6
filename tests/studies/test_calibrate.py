"""The calibration on planted rows (every sentence counted by hand), and as a script on a small zoo of codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.calibrate import Calibrate, main
from studies.questions.calibrate.figures import figures
from studies.questions.calibrate.judge import (
    judge,
    lettered,
    outcome,
    regime_of_sequence,
    told_in_words,
    totals,
    whole_calls,
)
from studies.questions.calibrate.measure import CHANGED, FRESH, KEPT_TASK, SEEN, SEEN_PROGRAMMES, cases, run_case
from studies.questions.calibrate.page import html_report, page
from studies.questions.controls import CodecFailed, codec, load_codec, save_codec
from studies.questions.controls.codec_files import CODECS, bundled_codecs
from studies.questions.controls.operations import rule_90
from studies.zoo import ZOO, listing

ROOT = Path(__file__).resolve().parents[2]


def row(truth, regime="", *, sequence="", letters="", n=16, kept=True, family="codec", control="one", dial=None,
        **more):
    base = {"key": f"{family}: {control}, {truth} {regime} {sequence} {n} {kept} {dial}", "truth": truth,
            "regime": regime, "sequence": sequence, "letters": letters, "n": n, "kept": kept, "family": family,
            "control": control, "dial": dial, "seed": 0, "seconds": 1.0, "accuracy": None, "tau": None}
    return base | more


PLANTED = [
    row("programme", "iterating", sequence="BAAA", letters="ABBB", least_equal=0.97, largest_different=0.1,
        control="a"),
    row("programme", "programme", sequence="ABAB", letters="ABAB", n=32, least_equal=0.9, largest_different=0.05,
        control="b"),
    row("programme", "undecided", sequence="ABCD", letters="????", kept=False, control="c"),
    row("programme", "iterating", sequence="ABCD", letters="AAAA", n=32, largest_different=0.8,
        control="d"),
    row("nothing", "nothing", family="untrained", control="flat"),
    row("nothing", "iterating", family="untrained", control="deep"),
    row("settled", "settled", family="far loops"),
    row("own weights", "iterating", family="weights of its own"),
    row("never the same", "nothing", family="counter"),
    row("never the same", "programme", family="counter"),
    row("dial", "iterating", family="mixture", dial=0.0, tau=0.9, letters="AAA"),
    row("dial", "programme", family="mixture", dial=1.0, tau=-0.2, letters="ABA"),
    {**row("identity", family="gated copy and deep twin", control="automaton"), "logits": 2e-6, "tau_loop": 3e-5,
     "tau_layer": 4e-5, "tau_layer_relative": 4e-5},
    row("shuffled", family="shuffled content", tau=-0.3),
]


# ----------------------------------------------------------------- the rule on cases

@pytest.mark.parametrize(("sequence", "regime"), [
    ("AA", "iterating"), ("AB", "unrolled"), ("AAAA", "iterating"), ("ABBB", "iterating"), ("ABCD", "unrolled"),
    ("ABCA", "programme"), ("AAB", "programme"), ("ABAB", "programme"), ("AABB", "programme"), ("ABCABC", "programme")])
def test_what_a_programme_should_be_called(sequence, regime):
    assert regime_of_sequence(sequence) == regime


def test_letters_are_named_as_they_come():
    assert lettered("DADCD") == "ABACA"
    assert lettered("B·?B") == "A·?A"


def test_outcomes():
    assert [outcome(case) for case in PLANTED] == [
        "right", "right", "undecided", "wrong", "right", "wrong", "right", None, "undecided", "right", *[None] * 4]


def test_right_regime_with_wrong_letters_is_wrong():
    assert outcome(row("programme", "programme", sequence="ABAB", letters="ABBA")) == "wrong"
    assert outcome(row("programme", "programme", sequence="ABAB", letters="?BAB")) == "right"
    assert outcome(row("programme", "programme", sequence="CABAB", letters="?ABAB")) == "right"
    assert outcome(row("programme", "iterating", sequence="AAAA", letters="?AAA")) == "right"
    assert outcome(row("programme", "iterating", sequence="AAAA", letters="ABBB")) == "wrong"
    assert outcome(row("programme", "unrolled", sequence="ABCD", letters="????")) == "right"


def test_totals_are_counted():
    kept = totals(PLANTED, True)
    assert (kept["n"], kept["right"], kept["wrong"], kept["undecided"]) == (8, 5, 2, 1)
    assert kept["right_of_decided"] == pytest.approx(5 / 7)
    assert totals([], True)["right_of_decided"] is None


def test_calls_with_fewer_examples_count_by_examples_alone():
    few = [row("programme", "undecided", sequence="AA", control="a"), row("programme", "iterating", sequence="AA",
           letters="AA", n=64, control="a"), row("programme", "undecided", sequence="AB", control="b")]
    assert [case["n"] for case in whole_calls(few)] == [64, 16]
    found = judge(few)
    assert (found["totals"]["kept"]["n"], found["totals"]["kept"]["undecided"]) == (2, 1)
    assert [(size["value"], size["n"]) for size in found["sizes"]] == [(16, 2), (64, 1)]


def test_every_sentence_is_made_from_the_rows():
    said = "\n".join(told_in_words(PLANTED))
    for part in ("8 calls with a known truth: 5 right, 2 wrong, 1 undecided (71% of the decided ones are right)",
                 "On what was looked at, 1 calls with a known truth: 0 right, 0 wrong, 1 undecided.",
                 "1 of 2 untrained models of 2 shapes", "at least 0.90 between loops of the same operation",
                 "at most 0.80 between loops of different ones", "1 of 2 with 16 examples (0 wrong)",
                 "1 of 2 with 32 examples (1 wrong)", "differ by at most 2.0e-06 in their logits and 3.0e-05 in τ",
                 "are called iterating (1 of 1); nothing is counted here",
                 "from 0 to 1: mean τ falls from 0.90 to -0.20; called iterating at the one end and programme at the "
                 "other", "τ is -0.30 at most", "called iterating (AAAA), and is unrolled ABCD"):
        assert part in said, part
    turned = [{**case, "dial": 1.0 - case["dial"]} if case["dial"] is not None else case for case in PLANTED]
    assert "mean τ rises from -0.20 to 0.90" in "\n".join(told_in_words(turned))


def test_criteria_say_whether_they_hold():
    found = {c["name"].split(",")[0].split(" called")[0]: c["met"] for c in judge(PLANTED)["criteria"]}
    assert found["right"] is False
    assert found["wrong (≤ 5%)"] is False
    assert found["untrained models"] is False
    many = [row("nothing", "nothing", family="untrained", control=str(i % 5)) | {"key": str(i)} for i in range(40)]
    assert all(c["met"] for c in judge(many)["criteria"][:4])
    assert judge(many[:39])["criteria"][3]["met"] is False
    exact = judge(PLANTED)["criteria"][-1]
    assert exact["met"] is True
    apart = [{**case, "tau_loop": 2e-4} if case["truth"] == "identity" else case for case in PLANTED]
    assert judge(apart)["criteria"][-1]["met"] is False


def test_pages_and_figures_hold_the_tables():
    found = judge(PLANTED)
    stored = {"found": found, "thresholds": {"date": "2026-11-26"}, "cases": PLANTED,
              "provenance": {"program": "python studies/calibrate.py", "seconds": 120.0}}
    text = page(stored, ("power",))
    for sentence in found["words"]:
        assert f"- {sentence}" in text
    assert "![power](power.svg)" in text
    assert all(f"- {change}" in text for change in CHANGED)
    assert "| iterating | 1 |" in text
    drawn = figures(found)
    assert set(drawn) == {"confusion", "power", "dials"}
    assert drawn["confusion"][1].data[0].z[0][0] == 1.0
    report = html_report(stored, drawn)
    assert all(criterion["name"].replace("≥", "≥") in report for criterion in found["criteria"])
    assert figures(judge(PLANTED[4:5])).keys() == {"confusion"}


# ------------------------------------------------------------------------- the cases

def test_cases_are_told_apart_and_half_of_the_seeds_is_kept():
    todo = cases()
    assert len({case.key for case in todo}) == len(todo)
    assert sum(case.truth == "nothing" for case in todo) >= 40
    assert len({case.control for case in todo if case.truth == "nothing"}) >= 5
    for case in todo:
        odd = case.seed % 2 == 1
        seen = (case.control, case.seed, case.n) == SEEN
        fresh = case.control in FRESH and case.control not in SEEN_PROGRAMMES
        assert case.kept == ((odd and not seen and case.control not in SEEN_PROGRAMMES)
                             or case.control.startswith(KEPT_TASK) or fresh)


def test_an_untrained_model_and_a_programme_come_out_right():
    todo = {case.key: case for case in cases()}
    flat = run_case(todo["untrained: two layers, seed 7, 32 examples"])
    assert flat["regime"] in ("nothing", "undecided")
    assert outcome(flat) != "wrong"
    made = run_case(todo["codec: AAAA, seed 1, 64 examples"])
    assert outcome(made) == "right"
    assert made["least_equal"] > 0.5
    json.dumps(made, allow_nan=False)
    moved = run_case(todo["shuffled content: AAAA, seed 1, 64 examples"])
    assert moved["tau"] < 0.1


@pytest.mark.slow
def test_copies_that_compute_the_same_get_the_same():
    todo = {case.key: case for case in cases()}
    for family in ("gated copy and deep twin", "loop and unrolled copy"):
        found = run_case(todo[f"{family}: automaton, seed 0, 32 examples"])
        assert found["logits"] < 1e-4
        assert found["tau_loop"] < 1e-4


def test_the_script_goes_on_where_it_stopped(tmp_path, capsys):
    args = {"families": ("shuffled content",), "runs": tmp_path / "runs", "results": tmp_path / "results",
            "codecs": tmp_path / "codecs", "pictures": False}
    (tmp_path / "codecs").mkdir()
    (tmp_path / "codecs" / "AAAA").symlink_to(CODECS / "AAAA")
    assert main(Calibrate(**{**args, "render": True})) == 2
    assert "holds no case" in capsys.readouterr().err
    assert main(Calibrate(**args)) == 0
    file = tmp_path / "runs" / "calibration" / "cases.jsonl"
    rows = file.read_text()
    assert len(rows.splitlines()) == 2
    file.write_text(rows + '{"key": "half wri')
    assert main(Calibrate(**args)) == 0
    assert file.read_text().startswith(rows)
    assert len(file.read_text().splitlines()) == 3
    stored = json.loads((tmp_path / "results" / "calibration" / "calibration.json").read_text())
    assert len(stored["cases"]) == 2
    assert "cases were not run" in capsys.readouterr().out
    assert main(Calibrate(**{**args, "families": ("magic",)})) == 2
    assert "no controls are called magic" in capsys.readouterr().err


def test_bundled_results_are_the_pages_of_their_cases():
    folder = ROOT / "results" / "calibration"
    if not (folder / "calibration.json").exists():
        pytest.skip("the calibration was not run")
    stored = json.loads((folder / "calibration.json").read_text())
    assert json.loads(json.dumps(judge(stored["cases"]))) == stored["found"]
    pictures = tuple(name for name in ("confusion", "power", "dials") if (folder / f"{name}.svg").exists())
    assert page(stored, pictures) == (folder / "page.md").read_text()


# ---------------------------------------------------------------------------- codecs

def test_a_codec_is_read_back_as_it_was_written(tmp_path):
    made = codec("EE", bits=5, width=16, d_mlp=64, batch_size=128, seed=1)
    folder = save_codec(made, tmp_path / "EE", command="python studies/codecs.py")
    again = load_codec(folder)
    assert (again.truth, again.accuracy, again.steps) == ("EE", 1.0, made.steps)
    inputs = made.inputs(20, seed=3)
    assert (again.module(inputs).argmax(-1) == made.targets(20, seed=3)).all()
    assert again.module.config == made.module.config
    assert "**EE**" in (folder / "README.md").read_text()
    own = codec("FF", operations={"F": rule_90}, bits=5, width=16, d_mlp=64, batch_size=128, seed=1)
    with pytest.raises(ValueError, match="only letters are stored"):
        save_codec(own, tmp_path / "FF", command="")
    (folder / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="not a codec's card"):
        load_codec(folder)
    with pytest.raises(FileNotFoundError, match=r"card\.json is missing"):
        load_codec(tmp_path / "none")
    with pytest.raises(CodecFailed, match="give it more steps"):
        codec("HH", bits=8, width=12, d_mlp=4, batch_size=8, steps=2)


def test_the_same_seed_gives_the_same_codec():
    one, other = (codec("EE", bits=5, width=16, d_mlp=64, batch_size=64, seed=1) for _ in range(2))
    for (name, value), again in zip(one.module.state_dict().items(), other.module.state_dict().values(), strict=True):
        assert (value == again).all(), name


def test_noise_on_the_clock_costs_accuracy():
    made = load_codec(CODECS / "ABAB")
    assert made.noisy(0.1).accuracy > 0.99
    assert made.noisy(3.0).accuracy < 0.8
    assert made.module.clock_noise == 0
    inputs = made.inputs(8, seed=0)
    loud = made.noisy(0.5).module
    assert (loud(inputs) == loud(inputs)).all()


@pytest.mark.parametrize("name", bundled_codecs())
def test_bundled_codecs_run_their_sequence(name):
    made = load_codec(CODECS / name)
    card = json.loads((CODECS / name / "card.json").read_text())
    assert card["truth"] == made.truth
    answers = made.module(made.inputs(200, seed=5)).argmax(-1)
    assert float((answers == made.targets(200, seed=5)).float().mean()) > 0.998
    assert card["command"] == f"python studies/codecs.py --names {name}"


def test_codecs_are_no_entries_of_the_zoo():
    found = listing()
    assert not found.problems
    assert not any("codec" in name for name in found.cards)
    assert sum(file.stat().st_size for file in (ZOO / "codecs").rglob("*") if file.is_file()) < 3e6
