"""The explorer's training page and the page of the ablations, through Streamlit's own test runner."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.figures.training import curves, last_loops, line_styles
from studies.ablations import Ablations
from studies.ablations import main as ablations
from studies.palette import KIND_COLOURS
from tests.small_zoo import make_zoo
from tests.studies.test_ablations import entry

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")]

ROWS = [{"flops": 1e9 * step, "nelbo": 1 / step, "train_loss": 2 / step, "cells@1": 0.5, "cells@8": 0.1 * step,
         "exact@1": 0.0, "exact@8": 0.05 * step} for step in (1, 2, 3)]


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    make_zoo(tmp_path / "zoo")
    pd.DataFrame(ROWS).to_parquet(tmp_path / "zoo" / "automaton-loop" / "metrics.parquet")
    run = tmp_path / "runs" / "sudoku-loop-6x6"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"flops": 4e9, "nel')
    for name in ("zoo", "runs", "results"):
        monkeypatch.setenv(f"LOOPSCOPE_{name.upper()}", str(tmp_path / name))
    return AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=600)


def test_the_training_page_shows_the_zoo_and_follows_a_run(app: AppTest, tmp_path: Path) -> None:
    app.run()
    app.switch_page("views/training.py").run()
    assert not app.exception
    assert app.selectbox(key="group").options == ["automaton", "sudoku"]
    app.selectbox(key="group").set_value("sudoku").run()
    assert not app.exception
    assert "sudoku-loop-6x6" in app.caption[0].value, "a run whose file is fresh is said to be going"
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert [trace["name"] for trace in spec["data"]] == ["sudoku-loop-6x6"]
    app.selectbox(key="measure").set_value("exact").run()
    assert "examples right" in json.loads(app.get("plotly_chart")[0].proto.spec)["layout"]["yaxis"]["title"]["text"]


def test_a_line_that_is_being_written_is_left_out() -> None:
    table = pd.DataFrame(ROWS)
    assert last_loops(table, "cells") == "cells@8"
    assert last_loops(table, "nothing") is None
    drawn = curves({"a": table, "b": table.drop(columns=["exact@1", "exact@8"])}, "exact")
    assert [trace.name for trace in drawn.data] == ["a"]
    assert list(drawn.data[0].y) == pytest.approx([0.05, 0.1, 0.15])
    assert drawn.layout.yaxis.title.text.startswith("examples right")


def test_the_page_of_the_ablations(app: AppTest, tmp_path: Path) -> None:
    zoo = tmp_path / "ablated"
    entry(zoo, "base")
    entry(zoo, "injection", input_injection="add")
    assert ablations(Ablations(examples=4, zoo=zoo, results=tmp_path / "results")) == 0
    app.run()
    assert not app.exception
    assert not app.error
    assert app.title[0].value == "What decides whether the state's direction settles?"
    assert list(app.dataframe[0].value["change"]) == ["base", "injection"]
    assert len(app.get("plotly_chart")) == 3


def test_runs_of_several_kinds_have_the_colour_of_their_kind_and_a_dash_per_seed():
    styles = line_styles(["automaton-loop seed 0", "automaton-deep seed 0", "automaton-loop seed 1"])
    assert [styles[name]["color"] for name in styles] == [KIND_COLOURS["loop"], KIND_COLOURS["deep"],
                                                          KIND_COLOURS["loop"]]
    assert [styles[name]["dash"] for name in styles] == ["solid", "solid", "dash"]


def test_runs_of_one_kind_have_a_colour_each():
    styles = line_styles(["automaton-loop", "arithmetic-loop", "a-run-of-the-user's"])
    assert len({style["color"] for style in styles.values()}) == 3
