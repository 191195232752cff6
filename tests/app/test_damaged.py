"""Damaged zoos, runs and results: what cannot be read is named, on pages and in scripts, and the rest works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import data
from app.show import MOST_PROBLEMS
from studies.claims import PaperClaims, main, read_groups
from studies.results import RESULTS, SCRIPTS, list_results, read_results
from studies.zoo import REQUIRED, find_groups, listing, load, names, read_metrics, triplet, variants_of
from tests.small_zoo import make_zoo, with_curves

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("verdict", "lens", "dynamics", "attention", "probes", "denoise", "training")
WHOLE = ["automaton-deep", "automaton-loop", "automaton-twin"]

pytestmark = [pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")]

Damage = Callable[[Path], object]


def changed(**values: Any) -> Damage:
    """Other values for keys of a JSON object; Ellipsis removes the key."""
    def damage(file: Path) -> None:
        saved = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in saved.items() if value is not ...}))
    return damage


def written(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


NOT_AN_OBJECT: dict[str, Damage] = {
    "empty": written(b""), "half": halved, "text": written(b"hello"), "bytes": written(b"\xff\xfe\x00\x01"),
    "list": written(b"[1, 2]"), "number": written(b"3"), "null": written(b"null"), "string": written(b'"card"'),
    "deep": written(b"[" * 100_000)}

CARDS: dict[str, Damage] = {
    **NOT_AN_OBJECT,
    **{f"without-{key}": changed(**{key: ...}) for key in REQUIRED},
    **{f"null-{key}": changed(**{key: None}) for key in REQUIRED},
    "kind": changed(kind="spiral"), "kind-list": changed(kind=["loop"]), "seed-text": changed(seed="zero"),
    "task-unknown": changed(task={"name": "chess"}), "task-text": changed(task="automaton"),
    "task-nameless": changed(task={"width": 6}), "task-name-list": changed(task={"name": ["automaton"]}),
    "task-field": changed(task={"name": "automaton", "colour": 3}),
    "task-value": changed(task={"name": "automaton", "width": "wide"}),
    "task-range": changed(task={"name": "automaton", "width": -4}),
    "topology": changed(topology={"head": 1}), "topology-text": changed(topology={
        "head": "1", "loop": 2, "tail": 1, "max_loops": 3})}

CURVES: dict[str, Damage] = {
    "empty": written(b""), "half": halved, "text": written(b"flops,nelbo\n1,2\n"),
    "no-flops": lambda file: pd.DataFrame({"nelbo": [1.0]}).to_parquet(file),
    "words": lambda file: pd.DataFrame({"flops": ["1e9"], "nelbo": [0.5]}).to_parquet(file),
    "words-beside": lambda file: pd.DataFrame({"flops": [1e9], "nelbo": [0.5], "cells@1": ["x"]}).to_parquet(file),
    "no-rows": lambda file: pd.DataFrame({"flops": [], "nelbo": []}, dtype=float).to_parquet(file)}

LINES: dict[str, bytes] = {
    "half": b'{"flops": 1e9, "nel', "text": b"hello", "list": b"[1, 2]", "blank": b"", "bytes": b"\xff\xfe\x00",
    "no-nelbo": b'{"flops": 1e9}', "words": b'{"flops": 1e9, "nelbo": "low"}', "null": b'{"flops": 1e9, "nelbo": null}'}

MODELS: dict[str, tuple[str, Damage]] = {
    **{f"config-{name}": ("config.json", damage) for name, damage in NOT_AN_OBJECT.items()},
    "config-gone": ("config.json", Path.unlink), "config-unknown": ("config.json", changed(colour=3)),
    "config-words": ("config.json", changed(d_model="wide")), "config-null": ("config.json", changed(n_heads=None)),
    "config-other": ("config.json", changed(d_mlp=8)), "config-vocab": ("config.json", changed(vocab_size=...)),
    "weights-empty": ("model.safetensors", written(b"")), "weights-half": ("model.safetensors", halved),
    "weights-text": ("model.safetensors", written(b"hello world, this is no tensor"))}


def damaged_zoo(folder: Path, file: str, damages: dict[str, Damage]) -> Path:
    """A whole triplet, and beside it one copy of the LoopMDM for each damage to ``file``, named after it."""
    zoo = with_curves(make_zoo(folder))
    for name, damage in damages.items():
        copy = zoo / f"automaton-loop-{name}"
        shutil.copytree(zoo / "automaton-loop", copy)
        damage(copy / file)
    return zoo


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged_zoo(tmp_path_factory.mktemp("cards"), "card.json", CARDS)


def app_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, page: str, zoo: Path | None = None,
           results: Path | None = None, **query: str) -> AppTest:
    """A page, opened; folders that are not given are empty, and runs are in tmp_path/runs."""
    for name, folder in (("ZOO", zoo), ("RESULTS", results), ("RUNS", tmp_path / "runs")):
        monkeypatch.setenv(f"LOOPSCOPE_{name}", str(folder or tmp_path / "none"))
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    if page != "verdict":
        app.switch_page(f"views/{page}.py").run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def said(app: AppTest) -> str:
    return "\n".join(str(part.value) for part in (*app.warning, *app.error))


# ------------------------------------------------------------------------------------------ cards


def test_a_listing_has_the_whole_entries_and_names_what_is_wrong_with_the_others(cards: Path) -> None:
    found = listing(cards)
    assert list(found.cards) == WHOLE
    assert {problem.file for problem in found.problems} == {cards / f"automaton-loop-{name}" / "card.json"
                                                            for name in CARDS}
    reasons = {problem.file.parent.name.removeprefix("automaton-loop-"): problem.reason for problem in found.problems}
    for key in REQUIRED:
        assert reasons[f"without-{key}"].startswith(f"it lacks {key}")
    for name in NOT_AN_OBJECT:
        assert "JSON" in reasons[name]
    assert "'spiral' is unknown; there are loop, twin, deep" in reasons["kind"]
    assert "no task is called 'chess'" in reasons["task-unknown"]
    assert all("studies/pretrain.py" in reason for reason in reasons.values()), "and what to do"


def test_scripts_leave_damaged_entries_out_and_say_so(cards: Path) -> None:
    uses: list[Callable[[], object]] = [lambda: names(cards), lambda: variants_of("automaton", cards),
                                        lambda: sorted(find_groups(cards)["automaton"][0])]
    for use, expected in zip(uses, (WHOLE, [""], ["deep", "loop", "twin"]), strict=True):
        with pytest.warns(UserWarning, match=r"automaton-loop-.*card\.json") as warned:
            assert use() == expected
        assert len({str(warning.message) for warning in warned}) == len(CARDS)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("verdict", "training")])
def test_pages_name_damaged_cards_and_work_on_the_rest(page: str, cards: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_on(monkeypatch, tmp_path, page=page, zoo=cards)
    assert not app.error
    assert len(app.warning) == 1
    shown = listing(cards).problems[:MOST_PROBLEMS]
    assert all(str(problem.file) in said(app) for problem in shown)
    assert f"and {len(CARDS) - MOST_PROBLEMS} more" in said(app)
    assert sorted(app.selectbox(key="model").options) == WHOLE
    assert app.get("plotly_chart")
    app.selectbox(key="model").select("automaton-deep").run()
    assert not app.exception
    assert app.get("plotly_chart")


@pytest.mark.parametrize("page", PAGES)
def test_a_zoo_of_nothing_but_damage_is_no_traceback(page: str, cards: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CARDS:
        if not name.startswith("w"):
            shutil.copytree(cards / f"automaton-loop-{name}", tmp_path / "zoo" / name)
    app = app_on(monkeypatch, tmp_path, page=page, zoo=tmp_path / "zoo")
    if page not in ("verdict", "training"):
        assert "card.json" in app.warning[0].value
        assert "No models in" in app.error[0].value


# ---------------------------------------------------------------------------- configs and weights


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = make_zoo(tmp_path_factory.mktemp("models"))
    for name, (file, damage) in MODELS.items():
        shutil.copytree(zoo / "automaton-loop", zoo / f"automaton-loop-{name}")
        damage(zoo / f"automaton-loop-{name}" / file)
    return zoo


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_refused_by_the_name_of_its_file(name: str, models: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=rf"automaton-loop-{name}/.*"):
        load(models / f"automaton-loop-{name}")


def test_scripts_leave_damaged_models_out_and_say_so(models: Path) -> None:
    with pytest.warns(UserWarning, match="left out") as warned:
        found = find_groups(models)
    assert {kind for seeds in found.values() for kinds in seeds.values() for kind in kinds} <= {"loop", "twin", "deep"}
    text = "\n".join(str(warning.message) for warning in warned)
    assert all(f"automaton-loop-{name}/" in text for name in MODELS)
    (models / "automaton-twin" / "config.json").rename(models / "config.json")
    try:
        with pytest.warns(UserWarning, match=r"automaton-twin.*config\.json"):
            assert list(triplet("automaton", zoo=models)) == ["loop", "deep"]
    finally:
        (models / "config.json").rename(models / "automaton-twin" / "config.json")


@pytest.mark.parametrize("name", ["config-list", "config-gone", "config-other", "weights-half"])
def test_a_page_names_the_damaged_file_of_the_model_chosen_and_another_can_be_chosen(
        name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_on(monkeypatch, tmp_path, page="lens", zoo=models)
    app.selectbox(key="model").select(f"automaton-loop-{name}").run()
    assert not app.exception
    assert MODELS[name][0] in app.error[0].value
    app.selectbox(key="model").select("automaton-twin").run()
    assert not app.exception
    assert not app.error
    assert app.get("plotly_chart")


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    (zoo / "automaton-loop" / "model.safetensors").unlink()
    app = app_on(monkeypatch, tmp_path, page="lens", zoo=zoo)
    assert str(zoo / "automaton-loop" / "model.safetensors") in app.warning[0].value
    assert sorted(app.selectbox(key="model").options) == ["automaton-deep", "automaton-twin"]


def test_a_task_whose_data_are_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is whole; the folder of texts that it names is on another machine."""
    zoo = make_zoo(tmp_path / "zoo")
    changed(task={"name": "text", "length": 24, "corpus": str(tmp_path / "texts")})(
        zoo / "automaton-deep" / "card.json")
    app = app_on(monkeypatch, tmp_path, page="lens", zoo=zoo)
    app.selectbox(key="model").select("automaton-deep").run()
    assert not app.exception
    assert "automaton-deep" in app.error[0].value


# ------------------------------------------------------------------------------- curves of training


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged_zoo(tmp_path_factory.mktemp("curves"), "metrics.parquet", CURVES)


@pytest.mark.parametrize("name", CURVES)
def test_a_damaged_curve_is_refused_by_name(name: str, curves: Path) -> None:
    with pytest.raises(ValueError, match=rf"automaton-loop-{name}/metrics\.parquet: it"):
        read_metrics(curves / f"automaton-loop-{name}")
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.parquet is missing"):
        read_metrics(curves / "nowhere")


def test_the_training_page_names_damaged_curves_and_draws_the_others(curves: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_on(monkeypatch, tmp_path, page="training", zoo=curves)
    assert not app.error
    assert len(app.warning) == 1
    assert said(app).count("metrics.parquet`:") == MOST_PROBLEMS
    assert f"and {len(CURVES) - MOST_PROBLEMS} more" in said(app)
    for measure in ("nelbo", "exact", "train_loss"):
        app.selectbox(key="measure").set_value(measure).run()
        assert not app.exception
    app.selectbox(key="measure").set_value("nelbo").run()
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert [trace["name"] for trace in spec["data"]] == WHOLE


def test_other_pages_do_not_need_the_curve(curves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_on(monkeypatch, tmp_path, page="lens", zoo=curves, model="automaton-loop-half")
    assert not app.error
    assert not app.warning


def test_the_claims_leave_out_entries_without_a_curve(tmp_path: Path) -> None:
    zoo = with_curves(make_zoo(tmp_path / "zoo"))
    halved(zoo / "automaton-deep" / "metrics.parquet")
    with pytest.warns(UserWarning, match=r"automaton-deep/metrics\.parquet"):
        assert main(PaperClaims(examples=4, few=3, pictures=False, zoo=zoo, results=tmp_path / "results")) == 0
    assert [group.entries for group in read_groups(tmp_path / "results")] == [["automaton-loop", "automaton-twin"]]


def test_lines_of_a_run_that_cannot_be_read_are_named_and_the_rest_is_drawn(tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    good = [json.dumps({"flops": 1e9 * step, "nelbo": 1 / step}).encode() for step in (1, 2, 3)]
    for name, line in LINES.items():
        (tmp_path / "runs" / f"sudoku-{name}").mkdir(parents=True)
        (tmp_path / "runs" / f"sudoku-{name}" / "metrics.jsonl").write_bytes(
            b"\n".join([good[0], line, good[1], line, good[2], b'{"flops": 4e9, "nel']))
    (tmp_path / "runs" / "sudoku-nothing").mkdir()
    (tmp_path / "runs" / "sudoku-nothing" / "metrics.jsonl").write_bytes(b"hello\nworld\n")
    app = app_on(monkeypatch, tmp_path, page="training")
    tables, problems = data.training_tables()
    assert set(tables) == {f"sudoku-{name}" for name in LINES}, "a file without one evaluation is left out"
    assert all(table.nelbo.tolist() == [1, 1 / 2, 1 / 3] for table in tables.values())
    assert {problem.file.parent.name for problem in problems} == {*tables, "sudoku-nothing"}
    for problem in problems:
        line = 1 if problem.file.parent.name == "sudoku-nothing" else 2
        assert problem.reason.startswith(f"line {line} is left out (and 1 more): it is not ")
    assert "metrics.jsonl" in said(app)
    assert app.get("plotly_chart")


# ------------------------------------------------------------------------------------------ results

ONE_OF_EACH = {json.loads(path.read_text())["study"]: path.parent.name
               for path in sorted(RESULTS.glob("*/verdict.json"), reverse=True)}
STUDIES = [ONE_OF_EACH[study] for study in SCRIPTS]


def copied(folder: Path, study: str) -> Path:
    copy = folder / study
    copy.mkdir(parents=True)
    for name in ("verdict.json", "measurements.nc"):
        shutil.copy(RESULTS / study / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(a folder with a whole copy of one study and damaged ones, damaged file by folder's name)."""
    folder, files = tmp_path_factory.mktemp("results"), {}
    whole = STUDIES[1]
    copied(folder, whole)
    for file, damages in (("verdict.json", {**NOT_AN_OBJECT, "gone": Path.unlink}),
                          ("measurements.nc", {"empty": written(b""), "half": halved, "text": written(b"hello"),
                                               "gone": Path.unlink})):
        for name, damage in damages.items():
            copy = copied(folder / "new", whole).rename(folder / f"claims-{file.partition('.')[0]}-{name}")
            damage(copy / file)
            files[copy.name] = file
    return folder, files


def test_damaged_results_are_left_out_by_name(results: tuple[Path, dict[str, str]], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files = results
    found, problems = list_results(folder)
    assert found == [STUDIES[1]]
    assert {problem.file for problem in problems} == {folder / name / file for name, file in files.items()}
    assert all("python studies/claims.py" in problem.reason for problem in problems)
    for name, file in files.items():
        with pytest.raises((FileNotFoundError, ValueError), match=file):
            read_results(folder / name)
    app = app_on(monkeypatch, tmp_path, page="verdict", results=folder)
    assert not app.error
    assert app.selectbox(key="study").options == [STUDIES[1]]
    assert all(str(problem.file) in said(app) for problem in problems[:MOST_PROBLEMS])
    assert "paper's claims" in app.title[0].value


def test_the_claims_page_is_written_without_groups_that_are_damaged(results: tuple[Path, dict[str, str]]) -> None:
    folder, files = results
    verdicts = [name for name, file in files.items() if file == "verdict.json" and not name.endswith("gone")]
    with pytest.warns(UserWarning, match=r"verdict\.json") as warned:
        groups = read_groups(folder)
    assert len({str(warning.message) for warning in warned}) == len(verdicts)
    assert STUDIES[1].removeprefix("claims-") in {group.name for group in groups}


@pytest.mark.parametrize("study", STUDIES)
def test_a_verdict_that_lacks_a_key_or_has_null_is_no_traceback(study: str, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(tmp_path / "results", study)
    whole = (copy / "verdict.json").read_text()
    explained = 0
    for key in json.loads(whole):
        for value in (..., None):
            (copy / "verdict.json").write_text(whole)
            changed(**{key: value})(copy / "verdict.json")
            app = app_on(monkeypatch, tmp_path, page="verdict", results=tmp_path / "results")
            if app.error:
                explained += 1
                assert str(copy) in app.error[0].value
                assert "python studies/" in app.error[0].value
    assert explained, "some keys cannot be done without"


@pytest.mark.parametrize("study", STUDIES)
def test_measurements_that_lack_a_dataset_are_no_traceback(study: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(tmp_path / "results", study)
    with h5py.File(copy / "measurements.nc", "a") as file:
        for group in list(file):
            del file[group]
    app = app_on(monkeypatch, tmp_path, page="verdict", results=tmp_path / "results")
    if app.error:
        assert str(copy) in app.error[0].value
