"""The program of the claims study, its figures and its page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from studies.claims import PaperClaims, main, pool, read_groups
from studies.questions.claims.figures import figures as claim_figures
from studies.questions.claims.judge import Judgement
from studies.questions.claims.measure import SampleSizes, measure
from studies.results import RESULTS, read_results
from studies.zoo import find_groups, triplet
from tests.small_zoo import make_zoo, with_curves


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_curves(make_zoo(tmp_path_factory.mktemp("zoo")))


@pytest.fixture(scope="module")
def measured(zoo: Path) -> dict[str, xr.Dataset]:
    return measure(triplet("automaton", zoo=zoo), SampleSizes(examples=12, few=6, batch=5, steps=(1, 2)))


def test_figures_show_every_claim(measured: dict[str, xr.Dataset]) -> None:
    figures = claim_figures(pool({0: measured, 1: measured}))
    assert list(figures) == list("abcdefg")
    for figure in figures.values():
        assert figure.data
        assert figure.layout.yaxis.title.text
    accuracy = measured["loops"].exact.sel(kind="loop").mean("example").values
    shown = next(trace for trace in figures["c"].data if trace.name == "LoopMDM, examples right")
    np.testing.assert_allclose(shown.y, accuracy)


def test_program(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice with one seed: the same page; a group not in the zoo: refused."""
    args = PaperClaims(examples=6, few=4, pictures=False, zoo=zoo, results=tmp_path)
    assert main(args) == 0
    page = (tmp_path / "claims.md").read_text()
    assert main(args) == 0
    assert (tmp_path / "claims.md").read_text() == page
    saved = json.loads((tmp_path / "claims-automaton" / "verdict.json").read_text())
    for letter, claim in saved["claims"].items():
        assert f"### ({letter}) {claim['claim']}" in page
        assert claim["word"] in page
    assert saved["provenance"]["models"]["automaton-loop"]["sha256"]
    assert main(PaperClaims(groups=("chess",), zoo=zoo, results=tmp_path)) == 2
    assert "no LoopMDM and twin of chess" in capsys.readouterr().err
    assert main(PaperClaims(zoo=tmp_path, results=tmp_path)) == 2


def test_groups_join_seeds(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    for kind in ("loop", "twin"):
        (zoo / f"automaton-{kind}").rename(zoo / f"automaton-{kind}-6x4-s1")
        path = zoo / f"automaton-{kind}-6x4-s1" / "card.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "variant": "6x4-s1", "seed": 1}))
    groups = find_groups(zoo)
    assert list(groups) == ["automaton-6x4"], "a deep twin alone is no group"
    assert {seed: sorted(kinds) for seed, kinds in groups["automaton-6x4"].items()} == {1: ["loop", "twin"]}


# ------------------------------------------------------------------------------- curves of several seeds


def own_evaluations(measured: dict[str, xr.Dataset], budgets: list[float]) -> dict[str, xr.Dataset]:
    """One seed per budget: all on the line NELBO = 2 − 1e−9 · FLOPs, each evaluated at FLOPs of its own."""
    seeds = {}
    for seed, budget in enumerate(budgets):
        training = measured["training"].copy(deep=True)
        training = training.assign_coords(flops=training.flops / training.flops[-1] * budget)
        training["nelbo"] = training.nelbo * 0 + 2 - 1e-9 * training.flops + 0.1 * seed
        seeds[seed] = {**measured, "training": training}
    return pool(seeds)


def mean_line(figure: go.Figure, name: str) -> go.Scatter:
    return next(trace for trace in figure.data if trace.name == name)


def test_the_mean_of_seeds_with_evaluations_of_their_own_does_not_jump_between_them(
        measured: dict[str, xr.Dataset]) -> None:
    figure = claim_figures(own_evaluations(measured, [1e9, 0.97e9, 1.05e9]))["a"]
    line = mean_line(figure, "LoopMDM")
    assert len(line.x) > 30
    np.testing.assert_allclose(line.y, 2 - 1e-9 * np.asarray(line.x) + 0.1, rtol=1e-6)
    thin = [trace for trace in figure.data if trace.line.width == 1 and trace.line.color == line.line.color]
    assert len(thin) == 3
    for seed, trace in enumerate(thin):
        assert np.isfinite(trace.y).all(), "a line without holes"
        np.testing.assert_allclose(trace.y, 2 - 1e-9 * np.asarray(trace.x) + 0.1 * seed, rtol=1e-6)


def test_a_mean_is_drawn_only_where_every_seed_was_measured(measured: dict[str, xr.Dataset]) -> None:
    pooled = own_evaluations(measured, [1e9, 0.5e9])
    line = mean_line(claim_figures(pooled)["a"], "LoopMDM")
    assert max(line.x) <= 0.5e9
    pooled["training"]["nelbo"].loc[{"seed": 1, "kind": "loop"}] = np.nan   # a kind that one seed lacks
    line = mean_line(claim_figures(pooled)["a"], "LoopMDM")
    assert max(line.x) == pytest.approx(1e9)
    pooled["training"]["nelbo"].loc[{"kind": "loop"}] = np.nan
    assert "LoopMDM" not in {trace.name for trace in claim_figures(pooled)["a"].data}


# --------------------------------------------------------------------------------------- --stored


def test_stored_measurements_are_judged_again_without_a_model(zoo: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PaperClaims(examples=6, few=4, pictures=False, zoo=zoo, results=tmp_path)) == 0
    page, verdict = (tmp_path / "claims.md"), tmp_path / "claims-automaton" / "verdict.json"
    before = page.read_text(), json.loads(verdict.read_text())
    values = json.loads(verdict.read_text())
    values["claims"]["a"]["quantities"][0]["value"] = 99.0
    verdict.write_text(json.dumps(values))
    again = PaperClaims(stored=True, pictures=False, zoo=tmp_path / "no zoo", results=tmp_path)
    assert main(again) == 0
    assert (page.read_text(), json.loads(verdict.read_text())) == before
    assert main(PaperClaims(stored=True, groups=("chess",), results=tmp_path)) == 2
    assert "no measurements of chess" in capsys.readouterr().err


def test_measurements_of_another_version_are_refused_by_name(zoo: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PaperClaims(examples=6, few=4, pictures=False, zoo=zoo, results=tmp_path)) == 0
    folder = tmp_path / "claims-automaton"
    datasets = read_results(folder).datasets
    (folder / "measurements.nc").unlink()
    for number, (name, data) in enumerate(datasets.items()):
        data.drop_vars("flops_ratio_side", errors="ignore").to_netcdf(
            folder / "measurements.nc", mode="a" if number else "w", group=name, engine="h5netcdf")
    assert main(PaperClaims(stored=True, pictures=False, results=tmp_path)) == 2
    said = capsys.readouterr().err
    assert "claims-automaton" in said
    assert "flops_ratio_side" in said
    assert "--groups automaton" in said


# --------------------------------------------------------------------------------- what is bundled


def bundled() -> list[Judgement]:
    return [judgement for group in read_groups(RESULTS) for judgement in group.judgements.values()]


def test_bundled_intervals_stay_inside_what_their_quantity_can_be() -> None:
    seen = 0
    for quantity in (quantity for judgement in bundled() for quantity in judgement.quantities):
        if quantity.per_cent:
            most = 2 if quantity.label.startswith("gain of") else 1
            assert np.isnan(quantity.low) or -most <= quantity.low <= quantity.high <= most, quantity.text
            seen += 1
        if "÷" in quantity.label:
            assert quantity.value > 0, quantity.text
            assert np.isnan(quantity.low) or quantity.low > 0, quantity.text
            seen += 1
    assert seen > 40


def test_bundled_verdicts_are_what_the_bundled_measurements_say(tmp_path: Path) -> None:
    for folder in RESULTS.glob("claims-*"):
        (tmp_path / folder.name).symlink_to(folder)
    from studies.questions.claims.judge import judge

    for group in read_groups(tmp_path):
        fresh = judge(read_results(tmp_path / f"claims-{group.name}").datasets)
        assert {k: v.to_dict() for k, v in fresh.items()} == {k: v.to_dict() for k, v in group.judgements.items()}, (
            f"{group.name}: run `python studies/claims.py --stored` again")
