"""More rows than in training: the numbers against the model and the rule themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hooks import HookedLoopMDM, LoopMDMConfig
from studies.length_generalization import LengthGeneralization, main
from studies.questions.length_generalization.judge import best_loops
from studies.questions.length_generalization.measure import lengthened, measure_entry
from studies.questions.length_generalization.page import table
from studies.results import read_results
from studies.zoo import Entry, load
from tests.small_zoo import TASK, make_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("zoo"))
    for card in folder.glob("*/card.json"):   # a triplet of one seed
        card.write_text(json.dumps({**json.loads(card.read_text()), "seed": 0}))
    return folder


def test_a_longer_model_is_the_same_model(zoo: Path) -> None:
    entry = load(zoo / "automaton-loop")
    longer = lengthened(entry, 2 * TASK.seq_len)
    tokens = TASK.sample(3, seed=0).tokens
    with torch.no_grad():
        assert torch.equal(longer(tokens, 3), entry.model(tokens, 3))
        assert longer(torch.cat([tokens, tokens], 1), 3).shape[1] == 2 * TASK.seq_len


def test_learned_positions_end(zoo: Path) -> None:
    entry = load(zoo / "automaton-loop")
    learned = HookedLoopMDM(LoopMDMConfig(3, 2, TASK.seq_len, position="learned"))
    with pytest.raises(ValueError, match="has learned positions, none beyond 24: only rotary models"):
        lengthened(Entry(entry.path, entry.card, TASK, learned), 99)


@pytest.mark.parametrize("rows", [4, 6])
def test_rows_against_a_slow_count(zoo: Path, rows: int) -> None:
    entry = load(zoo / "automaton-loop")
    by_row, exact = measure_entry(entry, rows, 2, examples=9, seed=1)
    task = replace(TASK, rows=rows)
    batch = task.sample(9, seed=1, split="test")
    model = lengthened(entry, task.seq_len)
    with torch.no_grad():
        right = model(batch.tokens.masked_fill(batch.free, 2), 2).argmax(-1) == batch.tokens
    free = [[[i, j] for i in range(9) for j in range(row * TASK.width, (row + 1) * TASK.width) if batch.free[i, j]]
            for row in range(rows)]
    assert free[0] == []
    assert np.isnan(by_row[0])
    for row in range(1, rows):
        assert by_row[row] == pytest.approx(np.mean([bool(right[i, j]) for i, j in free[row]]))
    assert exact == pytest.approx(np.mean([bool(right[i][batch.free[i]].all()) for i in range(9)]))


def test_the_study(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = LengthGeneralization(rows=(4, 5), loops=(1, 3), examples=8, pictures=False, zoo=zoo, results=tmp_path)
    assert main(args) == 0
    results = read_results(tmp_path / "length_generalization-automaton")
    data = results.datasets["curves"]
    assert data.cells.dims == ("kind", "seed", "n_rows", "n_loops", "row")
    assert data.exact.sel(kind="twin").isnull().sum() == 2, "the twins run once"
    assert data.exact.sel(kind="loop").notnull().all()
    assert data.cells.sel(n_rows=4, row=4).isnull().all()
    mean = data.cells.mean(["row", "seed"]).sel(kind="loop")
    assert np.allclose(best_loops(data).cells.mean(["row", "seed"]).sel(kind="loop"), mean.max("n_loops"))
    cells = best_loops(data).cells.mean(["row", "seed"])
    said, page = results.verdict["words"], (tmp_path / "length_generalization-automaton" / "report.html").read_text()
    assert said.startswith("Trained on 4 rows;")
    for kind, name in (("loop", "LoopMDM"), ("deep", "deep twin")):
        at = [f"{cells.sel(kind=kind, n_rows=n):.0%} of cells" for n in (4, 5)]
        assert f"{name} {at[0]} at 4 rows and {at[1].removesuffix(' of cells')} at 5" in said
        row = table(data).set_index("model").loc[name]
        assert [row["4 rows"].split(",")[0], row["5 rows"].split(",")[0]] == at
        assert row["5 rows"] in page
    assert said in page
    assert main(replace(args, group="sudoku-9x9")) == 2
    assert "--preset automaton" in capsys.readouterr().err
