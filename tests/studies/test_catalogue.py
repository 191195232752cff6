"""The catalogue: every entry on small models, what is missing named, a run that goes on, the page and the manual."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from probes import read_lens
from studies.catalogue import Catalogue, main
from studies.questions.catalogue import measure as measuring
from studies.questions.catalogue.entries import ENTRIES
from studies.questions.catalogue.entries.entry import FAMILIES
from studies.questions.catalogue.entries.setting import Setting
from studies.questions.catalogue.figures import drawn
from studies.questions.catalogue.measure import Asked, measure, storable
from studies.questions.catalogue.page import manual, page
from studies.questions.catalogue.subjects import measurable
from tests.small_zoo import TASK, make_zoo

FEW = Asked(examples=8, t=0.9, n_loops=3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(2)   # a random model whose loops do some work, so that they can be exchanged
        return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def setting(zoo: Path) -> Setting:
    [found] = measurable(["automaton-loop"], zoo=zoo)
    return found.setting(FEW.examples, FEW.t, FEW.n_loops, FEW.seed)


@pytest.mark.slow
@pytest.mark.parametrize("key", ENTRIES)
def test_every_entry_measures_a_looped_model_and_says_what_it_is(key: str, setting: Setting) -> None:
    entry = ENTRIES[key]
    found = entry.measure(setting)
    assert found.value.ndim <= 2
    assert found.value.attrs["long_name"]
    assert found.value.attrs["units"]
    assert not np.isinf(found.value.values).any()
    if "low" in found:
        fine = found.value.notnull()
        assert bool((found.low.where(fine) <= found.value.where(fine) + 1e-6).where(fine, True).all())
        assert bool((found.value.where(fine) <= found.high.where(fine) + 1e-6).where(fine, True).all())
    assert bool(entry.null) == ("null" in found)
    assert entry.family in FAMILIES
    assert all((entry.formula, entry.range, entry.meaning, entry.pitfall, entry.source))
    assert len(drawn(entry, {"one": storable(found), "two": storable(found)}).data) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, entry in ENTRIES.items() if entry.range in ("0 to 1", "−1 to 1")])
def test_values_stay_in_their_range(key: str, setting: Setting) -> None:
    value = ENTRIES[key].measure(setting).value
    assert float(value.max()) <= 1 + 1e-5
    assert float(value.min()) >= (0 if ENTRIES[key].range == "0 to 1" else -1) - 1e-5


def test_a_setting_is_the_models_own_run(setting: Setting) -> None:
    residual = setting.residual
    assert residual.dims == ("depth", "batch", "pos", "d_model")
    np.testing.assert_array_equal(residual.values[-1], setting.run.states[-1].numpy())
    lens = read_lens(setting.model, setting.inputs, n_loops=3, kind="coda", targets=setting.targets)
    value = lens.nll.where(xr.DataArray(setting.scored.numpy(), dims=("batch", "pos"))).mean("pos").mean("batch")
    np.testing.assert_allclose(ENTRIES["coda_lens"].measure(setting).value, value, rtol=1e-5)


def test_the_line_goes_through_the_first_two_loops_and_straight_on(setting: Setting) -> None:
    ends = setting.run.context.topology.loop_depths()
    for layer in range(2):
        first, second, third = (setting.line.values[loop[layer]] for loop in ends)
        np.testing.assert_array_equal(first, setting.residual.values[ends[0][layer]])
        np.testing.assert_allclose(second, setting.residual.values[ends[1][layer]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(third - second, second - first, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(setting.line.values[0], setting.residual.values[0])


def test_labels_are_the_answers_at_scored_positions(setting: Setting) -> None:
    labels, n_classes = setting.labels
    assert n_classes == 2
    assert bool((labels[~setting.scored] == -1).all())
    assert torch.equal(setting.tokens_of_labels[labels[setting.scored]], setting.targets[setting.scored])


def test_fewer_examples_are_the_first_ones(setting: Setting) -> None:
    few = setting.first(3)
    assert few.n == 3
    np.testing.assert_allclose(few.residual, setting.residual[:, :3], rtol=1e-5, atol=1e-6)
    assert torch.equal(few.targets, setting.targets[:3])


def test_models_give_what_they_can_and_the_rest_is_named(zoo: Path, tmp_path: Path, capsys) -> None:
    args = Catalogue(model=("automaton-loop", "automaton-twin"), only=("logit_lens", "exchange", "cka_twin"),
                     examples=8, n_loops=3, workers=1, zoo=zoo, runs=tmp_path / "runs", results=tmp_path / "results",
                     specimens=tmp_path)
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "automaton-loop: 3 measurements" in printed
    assert re.search(r"automaton-twin: 1 measurements in \d+ s; missing: cka_twin, exchange", printed)
    text = (tmp_path / "results" / "catalogue" / "page.html").read_text()
    assert "Missing of automaton-twin: it takes 2 loops, and there is 1." in text
    assert "there is no second model to compare with" in text
    assert "Causal scan" not in text
    kept = tmp_path / "results" / "catalogue" / "automaton-loop" / "measurements.nc"
    assert xr.load_dataset(kept, group="logit_lens", engine="h5netcdf").value.sizes["depth"] == 8


def test_a_run_that_was_stopped_goes_on(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = measurable(["automaton-loop"], zoo=zoo)
    made: list[str] = []
    own = measuring._make

    def make(key: str, setting: Setting, folder: Path) -> None:
        if key == "norm" and "norm" not in made:
            made.append("norm")
            raise KeyboardInterrupt
        made.append(key)
        own(key, setting, folder)

    monkeypatch.setattr(measuring, "_make", make)
    ask = {"kept": tmp_path, "entries": ("logit_lens", "norm"), "progress": False}
    with pytest.raises(KeyboardInterrupt):
        measure(subjects, FEW, **ask)
    found = measure(subjects, FEW, **ask)["automaton-loop"]
    assert made == ["logit_lens", "norm", "norm"]
    assert set(found.measured) == {"logit_lens", "norm"}
    measure(subjects, replace(FEW, seed=1), **ask)
    assert made[3:] == ["logit_lens", "norm"]                       # another question is asked anew


def test_an_error_of_our_own_is_not_taken_for_a_gap(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> xr.Dataset:
        raise RuntimeError("a fault")

    monkeypatch.setitem(ENTRIES, "norm", replace(ENTRIES["norm"], run=broken))
    with pytest.raises(RuntimeError, match="a fault"):
        measure(measurable(["automaton-loop"], zoo=zoo), FEW, kept=tmp_path, entries=("norm",), progress=False)


def test_models_of_other_makers_and_of_ones_own(zoo: Path, tmp_path: Path) -> None:
    albert = measurable(["ALBERT"], zoo=zoo, specimens=tmp_path)
    found = measure(albert, FEW, kept=tmp_path, entries=("coda_lens", "head_scan", "gains"), progress=False)["ALBERT"]
    assert set(found.measured) == {"coda_lens", "gains"}
    assert "no site attn.hook_z" in found.missing["head_scan"]
    np.save(tmp_path / "clean.npy", TASK.sample(6, seed=1).tokens.numpy())
    [own] = measurable([str(zoo / "automaton-loop")], zoo=tmp_path, tokens=tmp_path / "clean.npy", specimens=tmp_path)
    assert ENTRIES["norm"].measure(own.setting(6, 0.5, 2, 0)).value.sizes["depth"] == 6


def test_bad_questions_are_refused_with_a_remedy(zoo: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="no measurement is called nope; there are logit_lens"):
        Catalogue(only=("nope",))
    with pytest.raises(ValueError, match="examples"):
        Catalogue(examples=2)
    args = Catalogue(model=("nope",), zoo=zoo, specimens=tmp_path, runs=tmp_path, results=tmp_path)
    assert main(args) == 2
    assert "give clean tokens too: --tokens" in capsys.readouterr().err
    assert main(replace(args, model=("AntiBERTy",))) == 2
    assert "make specimens" in capsys.readouterr().err
    assert main(replace(args, tokens=tmp_path / "none.npy")) == 2
    assert "save clean tokens" in capsys.readouterr().err
    np.save(tmp_path / "bad.npy", np.zeros(3))
    assert main(replace(args, tokens=tmp_path / "bad.npy")) == 2
    assert "must hold whole numbers" in capsys.readouterr().err
    np.save(tmp_path / "long.npy", np.zeros((2, 999), dtype=np.int64))
    with pytest.raises(ValueError, match="999 positions"):
        measurable([str(zoo / "automaton-loop")], tokens=tmp_path / "long.npy", zoo=tmp_path, specimens=tmp_path)


def test_the_manual_and_the_page_hold_every_entry() -> None:
    text = manual({"logit_lens": "logit_lens.svg"})
    assert all(f"### {entry.name} (`{key}`)" in text for key, entry in ENTRIES.items())
    assert text.count("![") == 1
    assert text.count("**Pitfall**") == len(ENTRIES)
    assert page({}).startswith("<!doctype html>")
