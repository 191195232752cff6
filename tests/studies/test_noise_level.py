"""The noise level: planted models that store it, use it or do not know it; decisions on planted numbers."""

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
from studies.noise_level import NoiseLevel, main
from studies.questions.noise_level.figures import figures
from studies.questions.noise_level.judge import judge, r_squared
from studies.questions.noise_level.measure import POSITIONS, RANDOM, READERS, STEP, measure, slope_of
from studies.questions.noise_level.page import noise_table, page
from studies.questions.stage_test.subjects import Examples
from studies.results import read_results
from tests.small import MASK, small_model, small_tokens
from tests.small_zoo import make_zoo

N, LENGTH, WIDTH = 120, 12, 8


class Stores(nn.Module):
    """Coordinate 0 of a state is the share that is masked (or noise); each loop sharpens the answer by what it reads
    from coordinate ``used``. Coordinate 1 is the answer's logit, 2 the class that the position belongs to."""

    def __init__(self, used: int, stored: bool) -> None:
        super().__init__()
        self.stored, self.b = stored, Sharpen(used)

    def forward(self, tokens: torch.Tensor, n_loops: int = 2) -> torch.Tensor:
        share = (tokens == 2).float().mean(1, keepdim=True).expand(tokens.shape)
        noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5))
        x = torch.zeros(*tokens.shape, WIDTH)
        x[..., 0] = share if self.stored else noise
        x[..., 2] = 2.0 * (torch.arange(tokens.shape[1]) % 2) - 1
        x[..., 3] = noise
        for _ in range(n_loops):
            x = self.b(x)
        return answers(x)


class Sharpen(nn.Module):
    def __init__(self, used: int) -> None:
        super().__init__()
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[..., 1] = x[..., 1] + x[..., 2] * (0.2 + x[..., self.used])
        return out


def answers(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1], x[..., 1], torch.full_like(x[..., 1], -50.0)], -1)


def planted(used: int, stored: bool = True) -> tuple[xr.Dataset, xr.Dataset]:
    generator = torch.Generator().manual_seed(0)
    clean = (torch.arange(LENGTH) % 2).expand(N, LENGTH)
    t = torch.linspace(0.1, 1.0, N)
    masked = torch.rand(N, LENGTH, generator=generator) < t[:, None]
    masked[:, 0] = True
    inputs = clean.masked_fill(masked, 2)
    tokenizer = type("Bits", (), {"mask_token_id": 2})()
    model = adopt(Stores(used, stored), layers=["b"], n_loops=2, readout=answers, tokenizer=tokenizer)
    return measure(model, Examples(inputs, clean, masked, None), n_loops=2, seed=1)


def decided(read: xr.Dataset, moved: xr.Dataset) -> dict[str, Any]:
    return judge({"x": (read, moved)}, {"x": (read.sizes["example"],)}, untrained={"x": read})["rows"][0]


def test_a_noise_level_that_is_stored_and_used_is_read_and_moves_the_work() -> None:
    read, moved = planted(used=0)
    assert (r_squared(read.error) > 0.99).all()
    assert abs(r_squared(read.error, "shuffled")).max() < 0.3
    row = decided(read, moved)
    assert (row["read"], row["moved"]) == ("decodable", "changes the work")
    assert row["change_of_entropy"]["high"] < 0, "a higher level sharpens the answer here"


def test_a_noise_level_that_nothing_reads_moves_nothing() -> None:
    row = decided(*planted(used=4))
    assert (row["read"], row["moved"]) == ("decodable", "no more than a random push")


def test_a_noise_level_that_is_not_there_is_not_read() -> None:
    read, moved = planted(used=4, stored=False)
    assert r_squared(read.error).max() < 0.1
    assert decided(read, moved)["read"] == "not decodable"


def test_the_share_is_moved_by_the_step_and_no_random_push_is_longer() -> None:
    """In the planted model the level is coordinate 0 itself: its slope is 1 there."""
    share = torch.linspace(0, 1, 50)
    states = torch.stack([share, torch.zeros(50), 3 * share + 1], -1)
    torch.testing.assert_close(slope_of(states, share), torch.tensor([1.0, 0.0, 3.0]))
    assert slope_of(states, torch.full((50,), 0.5)).abs().max() == 0
    _, moved = planted(used=0)
    assert moved.push.values.tolist() == ["along", *(f"random {i}" for i in range(RANDOM))]
    still = moved.sel(sign=0)
    for name in ("entropy", "nll", "work"):
        np.testing.assert_allclose(still[name] - still[name].sel(push="along"), 0, atol=1e-6)
    assert (moved.nll.sel(push="along", sign=-1) > moved.nll.sel(push="along", sign=1)).all()


@torch.no_grad()
def test_pushes_equal_runs_by_hand() -> None:
    """Slope of the fitting half, added ± .2 at the masked positions of the state that enters loop 1; random pushes are
    as long as it is."""
    model, tokens = small_model(seed=3), small_tokens(16)
    truth = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(1))
    scored = tokens == MASK
    _, moved = measure(model, Examples(tokens, truth, scored, None), n_loops=3, seed=0)
    fit = torch.randperm(16, generator=torch.Generator().manual_seed(0)) < 8
    rank = torch.rand(scored.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~scored, 2.0)
    states, _, context = model.run(tokens, 3)
    depth = context.topology.loop_depths()[1][0]
    points = [(e, p) for e in range(16) for p in rank[e].argsort()[:POSITIONS].tolist() if scored[e, p]]
    x = torch.stack([states[depth][e, p] for e, p in points if fit[e]]).double().numpy()
    share = np.array([scored[e].double().mean() for e, _ in points if fit[e]])
    slope = torch.tensor(np.polyfit(share, x, 1)[0], dtype=torch.float32)
    random = torch.randn(RANDOM, len(slope), generator=torch.Generator().manual_seed(2))
    for name, direction in (("along", slope), ("random 3", random[3] * slope.norm() / random[3].norm())):
        for sign in (-1, 0, 1):
            pushed = states[depth] + sign * STEP * direction * scored[..., None]
            log_p = model.resume(depth, pushed, context).log_softmax(-1)
            nll = -log_p.gather(-1, truth[..., None])[..., 0]
            mine = torch.stack([nll[e][scored[e]].mean() for e in range(16) if not fit[e]])
            np.testing.assert_allclose(moved.nll.sel(push=name, sign=sign), mine, atol=1e-4, err_msg=f"{name} {sign}")
    assert abs(moved.nll.sel(push="along", sign=1) - moved.nll.sel(push="along", sign=-1)).max() > 1e-3


def test_those_who_fit_do_not_judge() -> None:
    """With noise for features and few points a regression that judged its own points would look good."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.zeros(16, LENGTH, dtype=torch.long)
    masked = torch.rand(16, LENGTH, generator=generator) < 0.5
    masked[:, 0] = True
    tokenizer = type("Bits", (), {"mask_token_id": 2})()
    model = adopt(Stores(4, False), layers=["b"], n_loops=2, readout=answers, tokenizer=tokenizer)
    read, _ = measure(model, Examples(clean.masked_fill(masked, 2), clean, masked, None), n_loops=2, seed=0)
    assert read.sizes["example"] == 8
    assert r_squared(read.error).max() < 0.3
    with pytest.raises(ValueError, match="at least 8"):
        measure(model, Examples(clean[:4], clean[:4], masked[:4], None), n_loops=3, seed=0)


# --------------------------------------------------------------------- decisions

def numbers(r2: float, extra: float, *, beyond: float = 0.5, spread: float = 0.003) -> tuple[xr.Dataset, xr.Dataset]:
    rng = np.random.default_rng(0)

    def noisy(values: Any) -> np.ndarray:
        return np.asarray(values)[..., None] + spread * rng.normal(size=(*np.shape(values), 60))

    error = np.empty((len(READERS), 3))
    for r, reader in enumerate(READERS):
        error[r] = {"state": 1 - r2, "shuffled": 1.0, "confidence": 0.8, "both": 0.8 * (1 - beyond),
                    "mean": 1.0}[reader]
    read = xr.Dataset({"error": (("reader", "loop", "example"), noisy(error))},
                      coords={"reader": list(READERS), "loop": range(3)})
    work = np.full((3, 3), 0.5)
    work[0] = [0.5 - extra / 2, 0.5, 0.5 + extra / 2]
    values = {name: (("push", "sign", "example"), noisy(work)) for name in ("entropy", "nll", "work")}
    return read, xr.Dataset(values, coords={"push": ["along", "random 0", "random 1"], "sign": [-1, 0, 1]})


def test_each_decision_is_made_where_it_holds() -> None:
    assert decided(*numbers(0.9, 0.2))["read"] == "decodable"
    assert decided(*numbers(0.1, 0.2))["read"] == "not decodable"
    assert decided(*numbers(0.5, 0.2))["read"] == "undecided"
    assert decided(*numbers(0.9, 0.2))["moved"] == "changes the work"
    assert decided(*numbers(0.9, 0.0))["moved"] == "no more than a random push"
    assert decided(*numbers(0.9, 0.0, spread=0.2))["moved"] == "undecided"
    assert decided(*numbers(0.9, 0.2, beyond=0.0))["beyond_confidence"] == "no"
    assert decided(*numbers(0.9, 0.2))["beyond_confidence"] == "yes"


def test_sentences_say_what_the_rows_say() -> None:
    found = {"one": numbers(0.9, 0.2), "two": numbers(0.2, 0.0)}
    verdict = judge(found, dict.fromkeys(found, (60,)),
                    untrained={"one": numbers(0.95, 0)[0], "two": numbers(0.1, 0)[0]})
    words = " ".join(verdict["words"])
    assert "is decodable from a masked position's state: one R² 0.90" in words
    assert "is not decodable from a masked position's state: two R² 0.20" in words
    assert "In 1 of 2 tasks an untrained model" in words
    assert "two 0.10" in words
    assert "Moving along it changes the work of the loop more than random pushes of the same length do: one " in words
    drawn = figures(verdict["rows"])
    assert all(name in page(verdict, drawn) for name in found)
    assert list(noise_table(verdict)["so it is"]) == ["decodable", "not decodable"]
    np.testing.assert_allclose(drawn["read"][2].data[1].y, verdict["rows"][0]["r2_untrained"])


# ------------------------------------------------------------------------- the whole

@pytest.mark.slow
def test_the_study_runs_on_a_zoo(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    assert main(NoiseLevel(zoo=zoo, results=tmp_path / "results", per_level=6, pictures=False)) == 0
    results = read_results(tmp_path / "results" / "noise_level")
    assert [row["subject"] for row in results.verdict["rows"]] == ["automaton"]
    assert set(results.datasets) == {"automaton-read", "automaton-moved"}
    json.dumps(results.verdict, allow_nan=False)


def test_bad_settings_are_refused_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="per_level must be at least 4"):
        NoiseLevel(per_level=1)
    zoo = make_zoo(tmp_path / "zoo")
    assert main(NoiseLevel(groups=("chess",), zoo=zoo, results=tmp_path / "r")) == 2
    assert "no looped model of chess" in capsys.readouterr().err
