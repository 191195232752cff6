"""Loops × denoising steps: the numbers by hand, planted answers for both measurements, decisions on planted numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from hooks import adopt
from probes.cycles import own_loops
from probes.exchange import Clocks, Trajectory, exchange
from studies.loops_and_steps import LoopsAndSteps, main
from studies.questions.loops_and_steps.figures import figures
from studies.questions.loops_and_steps.judge import judge
from studies.questions.loops_and_steps.measure import STEPS, WAYS, EarlierClocks, measure, surest
from studies.questions.loops_and_steps.page import page, steps_table
from studies.questions.stage_test.subjects import Examples
from studies.results import read_results
from tests.small import MASK, small_model, small_tokens
from tests.small_zoo import make_zoo

N = 40


# --------------------------------------------------------------------- a planted model

class Filler(nn.Module):
    """Each loop fills the next masked position with the bit on its left, and knows nothing of those beyond.

    The state of a position is [is it known, its bit as ±1]; position 0 is always visible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.b = Fill()

    def forward(self, tokens: torch.Tensor, n_loops: int = 6) -> torch.Tensor:
        known = (tokens != 2).float()
        x = torch.stack([known, known * (2.0 * tokens.clamp_max(1) - 1)], -1)
        for _ in range(n_loops):
            x = self.b(x)
        return read_bits(x)


class Fill(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = x[..., 0] > 0.5
        left = known.roll(1, 1)
        left[:, 0] = True
        fill = ~known & left
        bit = x[..., 1].roll(1, 1)
        return torch.stack([torch.where(fill, 1.0, x[..., 0]), torch.where(fill, bit, x[..., 1])], -1)


def read_bits(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-4 * x[..., 1], 4 * x[..., 1], torch.full_like(x[..., 1], -50.0)], -1)


def filled(n: int = 24, length: int = 9) -> tuple[Any, Examples]:
    bits = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(0)).expand(n, length).clone()
    inputs = bits.clone()
    inputs[:, 1:] = 2
    tokenizer = type("Bits", (), {"mask_token_id": 2})()
    model = adopt(Filler(), layers=["b"], n_loops=6, readout=read_bits, tokenizer=tokenizer)
    return model, Examples(inputs, bits, inputs == 2, None)


def test_writing_what_the_loops_have_found_is_as_good_as_one_more_loop() -> None:
    model, drawn = filled()
    found = measure([model], drawn, n_loops=6, share=1 / 3)
    nll = found.nll.mean("example")
    four = nll.sel(loop_written=3)             # four of eight are known, and half of them are written
    assert float(four.sel(way="restart")) == pytest.approx(float(four.sel(way="go on")), abs=1e-5)
    assert float(four.sel(way="stay") - four.sel(way="go on")) > 0.1
    assert float(four.sel(way="other tokens")) > float(four.sel(way="restart")) + 0.2
    early = nll.sel(loop_written=0)            # one is known, and guesses are written beside it
    assert float(early.sel(way="restart")) > float(early.sel(way="go on")) + 0.2
    assert float(early.sel(way="true tokens")) < float(early.sel(way="go on"))
    decided = judge({"filler": found}, {"filler": (24,)})["rows"][0]["restarts"]
    assert decided[3]["decision"] == "as good"
    assert decided[0]["decision"] == "worse"


def test_the_surest_are_written_and_one_position_stays() -> None:
    answer = torch.zeros(2, 5, 3)
    answer[:, :, 0] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    scored = torch.tensor([[True, True, True, True, False], [True, False, False, False, False]])
    written = surest(answer, scored, 0.5)
    assert written.tolist() == [[False, True, False, True, False], [False] * 5]
    assert surest(answer, scored, 0.99).sum(1).tolist() == [3, 0]


# ---------------------------------------------------------------------- by hand

@torch.no_grad()
def test_between_steps_only_the_clock_of_the_operation_is_the_earlier_one() -> None:
    model, tokens = small_model(seed=3), small_tokens(12)
    truth = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(1))
    drawn = Examples(tokens, truth, tokens == MASK, None)
    found = measure([model], drawn, n_loops=3, share=0.5)
    cycle = own_loops(model.topology(3))
    answer = model(tokens, 3)
    written = surest(answer, drawn.scored, 0.5)
    later = torch.where(written, answer.argmax(-1), tokens)
    left = drawn.scored & ~written
    own = exchange(model, later, cycle, scored=left)
    np.testing.assert_allclose(found.kl.sel(step="same"), own.kl, atol=1e-5)
    np.testing.assert_allclose(found.work, own.work, atol=1e-5)
    first, second = Trajectory.of(model, tokens, cycle), Trajectory.of(model, later, cycle)
    mine = Clocks.of(second, left.long())
    before = EarlierClocks(mine, Clocks.of(first, drawn.scored.long()))
    with_earlier = exchange(model, later, cycle, trajectory=second, frame=before, scored=left)
    np.testing.assert_allclose(found.kl.sel(step="before"), with_earlier.kl, atol=1e-5)
    assert float(abs(found.kl.sel(step="before") - found.kl.sel(step="same")).max()) > 1e-3
    every = torch.arange(12)
    content = second.states[0]
    for role in (0, 1):
        moved = before.carry(content, 0, 2, every)[left == bool(role)]
        mean = first.states[2][drawn.scored == bool(role)].mean(0)
        np.testing.assert_allclose(moved.mean(0), mean, atol=0.3)            # the other folds' clocks, nearly all
    same = EarlierClocks(mine, mine)
    torch.testing.assert_close(same.carry(content, 0, 2, every), mine.carry(content, 0, 2, every))
    assert not torch.allclose(before.carry(content, 0, 2, every), mine.carry(content, 0, 2, every), atol=1e-2)
    assert before.carry_back.__func__ is Clocks.carry_back                   # what was made goes on by its own clock


@torch.no_grad()
def test_restarts_equal_runs_by_hand() -> None:
    model, tokens = small_model(seed=3), small_tokens(8)
    truth = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(1))
    drawn = Examples(tokens, truth, tokens == MASK, None)
    found = measure([model], drawn, n_loops=3, share=0.5).nll
    for k in (0, 1):
        answer = model(tokens, k + 1)
        written = surest(answer, drawn.scored, 0.5)
        left = drawn.scored & ~written
        inputs = {"restart": torch.where(written, answer.argmax(-1), tokens),
                  "true tokens": torch.where(written, truth, tokens),
                  "other tokens": torch.where(written, truth.roll(1, 0), tokens)}
        logits = {"stay": answer, "go on": model(tokens, k + 2), "afresh": model(tokens, 1),
                  **{way: model(given, 1) for way, given in inputs.items()}}
        assert set(logits) == set(WAYS)
        for way, given in logits.items():
            nll = -given.log_softmax(-1).gather(-1, truth[..., None])[..., 0]
            by_hand = [float(nll[e][left[e]].mean()) if left[e].any() else np.nan for e in range(8)]
            np.testing.assert_allclose(found.sel(way=way, loop_written=k), by_hand, atol=1e-5, err_msg=way)


@torch.no_grad()
def test_distances_are_nearest_to_themselves() -> None:
    model, tokens = small_model(seed=3), small_tokens(12)
    drawn = Examples(tokens, tokens.clamp_max(5), tokens == MASK, None)
    distance = measure([model], drawn, n_loops=3, share=0.01).distance.mean("example")   # nothing is written
    np.testing.assert_allclose(np.diag(distance), 0, atol=1e-6)
    assert (distance.values[~np.eye(4, dtype=bool)] > 0.01).all()


# --------------------------------------------------------------------- decisions

def numbers(first: float, later: float, *, work: float = 0.5, gain: float = 0.3, restart: float = 0.3,
            spread: float = 0.005) -> xr.Dataset:
    """What a subject would show whose first loop is done to these shares; ``gain`` and ``restart`` after loop 0."""
    rng = np.random.default_rng(0)

    def noisy(values: np.ndarray) -> np.ndarray:
        return np.asarray(values)[..., None] + spread * rng.normal(size=(*np.shape(values), N))

    tau = np.full((2, 3, 3), 0.5)
    tau[1, 0] = [first, later, later]
    nll = np.ones((len(WAYS), 2))
    ways = list(WAYS)
    nll[ways.index("go on")] -= gain
    nll[ways.index("restart")] -= restart
    nll[ways.index("other tokens")] += 1
    return xr.Dataset({
        "kl": (("step", "content", "operation", "example"), noisy(work * (1 - tau))),
        "work": (("content", "example"), noisy(np.full(3, work))),
        "distance": (("loop", "loop_before", "example"), noisy(1 - np.eye(4))),
        "nll": (("way", "loop_written", "example"), noisy(nll))},
        coords={"step": list(STEPS), "content": range(3), "operation": range(3), "way": ways, "loop_written": range(2)})


def row(*args: float, **options: float) -> dict[str, Any]:
    return judge({"x": numbers(*args, **options)}, {"x": (N,)})["rows"][0]


def test_each_answer_is_given_where_it_holds() -> None:
    assert row(0.9, 0.0)["answer"] == "starts anew"
    assert row(0.0, 0.9)["answer"] == "continues"
    assert row(0.9, 0.9)["answer"] == "cannot be told"
    assert row(0.4, 0.0)["answer"] == "undecided"
    assert row(0.9, 0.0, work=0.0)["answer"] == "nothing"


def test_each_decision_on_restarts_is_made_where_it_holds() -> None:
    assert row(1, 1)["restarts"][0]["decision"] == "as good"
    assert row(1, 1, restart=0.4)["restarts"][0]["decision"] == "better"
    assert row(1, 1, restart=-0.4)["restarts"][0]["decision"] == "worse"
    assert row(1, 1, gain=0.0, restart=0.0)["restarts"][0]["decision"] == "nothing to gain"
    assert row(1, 1, gain=0.0, restart=-1.0)["restarts"][0]["decision"] == "worse"
    assert row(1, 1, restart=0.31, spread=0.2)["restarts"][0]["decision"] == "undecided"


def test_sentences_say_what_the_rows_say() -> None:
    found = {"one": numbers(0.9, 0.0), "two": numbers(0.0, 0.9, restart=-0.4), "three": numbers(0.9, 0.0, restart=-0.4)}
    verdict = judge(found, dict.fromkeys(found, (N,)))
    words = verdict["words"]
    assert any(sentence.startswith("one, three: starts anew") for sentence in words)
    assert any(sentence.startswith("two: continues") for sentence in words)
    worse, = (sentence for sentence in words if "worse than one more loop: " in sentence)
    for row in verdict["rows"]:
        told = f"{row['subject']} {row['restarts'][0]['difference']['value']:+.3f}"
        assert (told in worse) == (row["subject"] != "one")
    assert "worse 4 of 6 times" in words[-2]
    assert words[-1].endswith("in 3 of 3 subjects.")
    drawn = figures(verdict["rows"])
    html = page(verdict, drawn)
    assert all(name in html for name in found)
    assert list(steps_table(verdict)["a step"]) == ["starts anew", "continues", "starts anew"]
    idle = judge({"idle": numbers(0.9, 0.0, work=0.0)}, {"idle": (N,)})["rows"]
    assert steps_table({"rows": idle})["first loop by the first before"][0] == "–"
    assert not figures(idle)["exchange"][2].data[0].y, "without work there is no share of it"
    blue = drawn["exchange"][2].data[0]
    np.testing.assert_allclose(blue.y, [row["first"]["value"] for row in verdict["rows"]])


# ------------------------------------------------------------------------- the whole

@pytest.mark.slow
def test_the_study_runs_on_a_zoo_and_finds_nothing_in_random_models(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    args = LoopsAndSteps(zoo=zoo, results=tmp_path / "results", examples=12, pictures=False)
    assert main(args) == 0
    results = read_results(tmp_path / "results" / "loops_and_steps")
    assert results.study == "loops_and_steps"
    assert [row["subject"] for row in results.verdict["rows"]] == ["automaton", "automaton, untrained"]
    assert results.verdict["rows"][1]["answer"] in ("nothing", "undecided")
    assert set(results.datasets) == {"automaton", "automaton-untrained"}
    json.dumps(results.verdict, allow_nan=False)


def test_bad_settings_are_refused_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    for options, message in (({"t": 0.0}, "t is the share"), ({"share": 1.0}, "share is a part"),
                             ({"examples": 3}, "examples must be at least 8")):
        with pytest.raises(ValueError, match=message):
            LoopsAndSteps(**options)
    zoo = make_zoo(tmp_path / "zoo")
    assert main(LoopsAndSteps(groups=("chess",), zoo=zoo, results=tmp_path / "r")) == 2
    assert "no looped model of chess" in capsys.readouterr().err
    assert main(LoopsAndSteps(zoo=tmp_path / "none", results=tmp_path / "r")) == 2
