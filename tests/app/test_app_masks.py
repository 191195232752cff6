"""Masks in the explorer touch free positions only, wherever they come from: the address, a click, other examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from app import data, selection
from studies.tasks import Batch
from studies.zoo import load
from tests.small_zoo import TASK, make_zoo

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    # AppTest leaves its folder of scripts to the garbage collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(("mask", "n_masked"), [("ffffff", 18), ("fc0000", 0), ("fe0000", 1), ("FFFFFF", 18)])
def test_a_mask_in_the_address_leaves_given_cells_visible(zoo: Path, monkeypatch: pytest.MonkeyPatch, mask: str,
                                                          n_masked: int) -> None:
    """The first row of six is given; its bits are the first six of the mask."""
    monkeypatch.setenv("LOOPSCOPE_ZOO", str(zoo))
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    app.query_params["masking"], app.query_params["mask"] = selection.BY_HAND, mask
    app.run()
    app.switch_page("views/lens.py").run()
    assert not app.exception
    assert f"{n_masked} of 18 free positions masked" in [caption.value for caption in app.caption]


@pytest.fixture
def scene(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> selection.Scene:
    """An example in which the first row is given, drawn by hand to hide row 1, among examples with other clues."""
    monkeypatch.setenv("LOOPSCOPE_ZOO", str(zoo))
    batch = TASK.sample(8, seed=0, split="test")
    free = batch.free.clone()
    free[1:, 6:12], free[1:, :6] = False, True   # elsewhere the second row is given instead of the first
    entry = load(zoo / "automaton-loop")
    hidden = TASK.regions() == 1
    return selection.Scene("automaton-loop", data.checkpoints()["automaton-loop"], entry, 0, 2,
                           Batch(batch.tokens, free), hidden, True, 1.0, 0)


def test_other_examples_under_a_mask_drawn_by_hand_keep_what_is_given_there(scene: selection.Scene) -> None:
    tokens, noised = scene.crowd(8)
    masked = noised == TASK.mask_token_id
    assert torch.equal(masked[0], scene.hidden)
    assert not masked[1:].any(), "the hidden row is given in them"
    everything = replace(scene, hidden=torch.ones(24, dtype=torch.bool))
    tokens, noised = everything.crowd(8)
    assert torch.equal(noised == TASK.mask_token_id, scene.batch.free)
    assert torch.equal(tokens, scene.batch.tokens)


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_other_examples_at_a_noise_level_keep_what_is_given_there(scene: selection.Scene, level: float) -> None:
    _, noised = replace(scene, by_hand=False, level=level).crowd(8)
    masked = noised == TASK.mask_token_id
    assert masked.any()
    assert not (masked & ~scene.batch.free).any()
    assert bool((masked == scene.batch.free).all()) == (level == 1)


def test_a_click_on_a_given_cell_changes_nothing(scene: selection.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {}
    monkeypatch.setattr(selection, "st", SimpleNamespace(session_state=state))
    selection.flip(scene, [0, 5, 6, 23])   # two given cells, one hidden, one visible
    drawn = selection.decode_mask(state["_mask"], 24)
    expected = scene.hidden.clone()
    expected[6], expected[23] = False, True
    assert torch.equal(drawn, expected)


def test_the_level_that_the_model_is_told_is_the_share_of_free_positions(scene: selection.Scene) -> None:
    assert scene.t == pytest.approx(6 / 18)
    assert replace(scene, hidden=scene.free).t == 1
    assert torch.equal(scene.noised == TASK.mask_token_id, scene.hidden)
