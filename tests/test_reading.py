"""docs/reading.md: what is called on its two ways is in the files that it lists, and these are not many."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.figures.grids import Look, Panel, mask_editor, token_grids
from app.figures.lens import lens_grid, region_curves
from probes import read_lens, stage_test
from studies.zoo import load
from tests.small_zoo import make_zoo

ROOT = Path(__file__).resolve().parents[1]
LENS, VERDICT, SHARED = re.split(r"^## .*$", (ROOT / "docs" / "reading.md").read_text(), flags=re.MULTILINE)[1:]


def files_of(section: str) -> list[str]:
    return re.findall(r"`((?:app|hooks|probes|studies)/[\w/]+\.py)`", section)


@pytest.mark.parametrize("section", [LENS, VERDICT])
def test_there_are_at_most_twelve_and_all_are_there(section: str) -> None:
    listed = files_of(section)
    assert len(listed) == len(set(listed)) == len(re.findall(r"^\d+\. ", section, re.MULTILINE)) <= 12
    assert all((ROOT / name).is_file() for name in (*listed, *files_of(SHARED)))
    for name, functions in re.findall(r"^\d+\. `([\w/.]+)`: (.*(?:\n(?!\d).*)*)", section, re.MULTILINE):
        text = (ROOT / name).read_text()
        for function in re.findall(r"`(\w+)`", functions):
            assert f"def {function}(" in text or name.endswith("hooked.py"), (name, function)


def called(work: Callable[[], Any]) -> set[str]:
    """Our files in which a function runs."""
    found: set[str] = set()
    before = sys.getprofile()

    def note(frame: Any, event: str, arg: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(ROOT)) and frame.f_code.co_name != "<module>":
            found.add(path.removeprefix(f"{ROOT}/"))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return {name for name in found if name.split("/")[0] in ("app", "hooks", "probes")}


def test_what_is_called_is_in_a_file_that_is_listed(tmp_path: Path) -> None:
    entry = load(make_zoo(tmp_path) / "automaton-loop")
    model, task = entry.model, entry.task
    batch = task.sample(16, seed=0)
    tokens, noised = batch.tokens, batch.tokens.masked_fill(batch.free, task.mask_token_id)

    def page() -> None:
        lens = read_lens(model, noised, n_loops=2, kind="coda", targets=tokens, top_k=2).isel(batch=0)
        look, regions = Look.of(task), task.regions().numpy()
        lens_grid(lens, "nll", look, tokens=tokens[0].numpy(), positions=[0, 1], regions=regions, region_name="row")
        region_curves(lens, "nll", regions, "row")
        token_grids([Panel("truth", tokens[0].numpy())], look, columns=1, cell=10)
        mask_editor(tokens[0].numpy(), (noised != tokens)[0].numpy(), batch.free[0].numpy(), look)

    known = {*files_of(LENS), *files_of(SHARED)}
    assert called(page) - known == set()

    def verdict() -> None:
        str(stage_test(model, noised, targets=tokens, scored=noised == task.mask_token_id, n_loops=3))

    known = {*files_of(VERDICT), *files_of(SHARED)}
    assert called(verdict) - known == set()
