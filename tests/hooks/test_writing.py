"""What is written through `written_whole` appears whole or not at all; names of the zoo are made in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooks.writing import written_whole
from studies.folders import entry_name, group_name, seeded, without_seed
from studies.results import SCRIPTS, list_results, made_by, read_results, write_results


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder"])
@pytest.mark.parametrize("after", ["a file", "a folder"])
def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path, before: str, after: str) -> None:
    target = tmp_path / "made" / "target"
    make(target, before, "old")
    make(target.with_name(".target.tmp"), before, "left by a process that was killed")
    with written_whole(target) as temporary:
        make(temporary, after, "new")
        if before != "nothing":
            assert (target / "inside" if before == "a folder" else target).read_text() == "old"
    assert (target / "inside" if after == "a folder" else target).read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    make(target, what, "old")
    def half() -> None:
        with written_whole(target) as temporary:
            make(temporary, what, "new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half()
    assert (target / "inside" if what == "a folder" else target).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def make(path: Path, what: str, text: str) -> None:
    if what == "a folder":
        path.mkdir(parents=True)
        (path / "inside").write_text(text)
    elif what == "a file":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(("variant", "seed", "name", "group"), [
    ("", 0, "sudoku-loop", "sudoku"), ("", 2, "sudoku-loop-s2", "sudoku"),
    ("6x6", 0, "sudoku-loop-6x6", "sudoku-6x6"), ("6x6", 12, "sudoku-loop-6x6-s12", "sudoku-6x6"),
    ("ablation-smax4", 1, "sudoku-loop-ablation-smax4-s1", "sudoku-ablation-smax4")])
def test_names_of_entries(variant: str, seed: int, name: str, group: str) -> None:
    assert entry_name("sudoku", "loop", seeded(variant, seed)) == name
    assert without_seed(seeded(variant, seed)) == variant
    assert group_name("sudoku", seeded(variant, seed)) == group


def test_results_say_which_study_they_are_of(tmp_path: Path) -> None:
    import xarray as xr

    data = {"numbers": xr.Dataset({"x": 1.0})}
    for number, study in enumerate(reversed(SCRIPTS)):   # whatever the folder is called
        folder = write_results(tmp_path / f"results-{number}", study=study, verdict={}, datasets=data, html="")
        assert read_results(folder).study == study
        assert made_by(folder) == f"python {SCRIPTS[study]}"
    names, problems = list_results(tmp_path)
    assert [read_results(tmp_path / name).study for name in names] == list(SCRIPTS)
    assert not problems
    with pytest.raises(ValueError, match="no study is called 'other'; there are stage_test"):
        write_results(tmp_path / "other", study="other", verdict={}, datasets=data, html="")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "script"), [
    ("claims-text", "studies/claims.py"), ("length_generalization-automaton", "studies/length_generalization.py"),
    ("mine", "studies/stage_test.py")])
def test_a_folder_without_a_verdict_is_made_by_what_its_name_says(tmp_path: Path, name: str, script: str) -> None:
    (tmp_path / name).mkdir()
    assert made_by(tmp_path / name) == f"python {script}"
