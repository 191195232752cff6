"""The claims study: measurements against the model itself, intervals against scipy, verdicts that can go each way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from hooks.model.diffusion import SamplerConfig, corrupt, nelbo, sample
from probes.attention import patterns
from studies.claims import pool
from studies.questions.claims import measure as claims_measure
from studies.questions.claims.judge import Estimate, Judgement, judge, quantity
from studies.questions.claims.measure import SampleSizes, first_crossing, loop_counts, measure
from studies.zoo import Entry, triplet
from tests.small_zoo import make_zoo, with_curves

SETTING = SampleSizes(examples=12, few=6, batch=5, steps=(1, 2))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_curves(make_zoo(tmp_path_factory.mktemp("zoo")))


@pytest.fixture(scope="module")
def models(zoo: Path) -> dict[str, Entry]:
    return triplet("automaton", zoo=zoo)


@pytest.fixture(scope="module")
def measured(models: dict[str, Entry]) -> dict[str, xr.Dataset]:
    return measure(models, SETTING)


# -------------------------------------------------------------------------------- measurements


def test_crossing() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([4.0, 2, 3, 1])
    assert first_crossing(x, y, 3) == 1.5
    assert first_crossing(x, y, 1.5) == 3.75
    assert first_crossing(x, y, 5) == 1
    assert math.isnan(first_crossing(x, y, 0.5))


def test_training_ratio(measured: dict[str, xr.Dataset]) -> None:
    """exp(−3x) reaches exp(−1) at x = 1/3: three times fewer FLOPs; straight lines between points are a little off."""
    ratio = measured["training"].flops_ratio
    assert ratio.sel(kind="loop") == pytest.approx(1, abs=1e-6)
    assert ratio.sel(kind="twin") == pytest.approx(3, rel=0.02)
    assert ratio.sel(kind="deep") == pytest.approx(1.5, rel=0.02)
    assert ratio.attrs["units"] == "1"


def test_loop_counts() -> None:
    assert loop_counts(8) == [1, 2, 4, 8, 12, 16, 24, 32]
    assert loop_counts(3) == [1, 2, 3, 4, 6, 9, 12]


@torch.no_grad()
def test_over_loops_is_the_model(models: dict[str, Entry], measured: dict[str, xr.Dataset]) -> None:
    data, task = measured["loops"], models["loop"].task
    batch = task.sample(12, seed=0, split="test")
    masked = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    for kind, n_loops in (("loop", 1), ("loop", 3), ("loop", 12), ("twin", 1), ("deep", 1)):
        score = task.score(models[kind].model(masked, n_loops, t=1.0).argmax(-1), batch)
        for name in ("cells", "exact"):
            np.testing.assert_allclose(data[name].sel(kind=kind, n_loops=n_loops), score[name], rtol=1e-6)
    assert data.exact.sel(kind="twin", n_loops=3).isnull().all(), "twins run once"
    generator = torch.Generator().manual_seed(0)
    t = claims_measure.antithetic_t(12, generator=generator)
    noised = corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)
    logits = models["loop"].model(noised, 3, t=t)
    bound = nelbo(logits, batch.tokens, noised, t, task.mask_token_id, free=batch.free)
    assert float(data.nelbo.sel(kind="loop", n_loops=3).mean()) == pytest.approx(float(bound), rel=1e-4)


@torch.no_grad()
def test_gain_by_noise(models: dict[str, Entry], measured: dict[str, xr.Dataset]) -> None:
    entry, gain = models["loop"], measured["noise"].gain
    batch = entry.task.sample(6, seed=0, split="test")
    noised = corrupt(batch.tokens, 1.0, entry.task.mask_token_id, free=batch.free)
    for example in range(6):
        where = batch.free[example]
        nll = [-entry.model(noised[example:example + 1], s, t=1.0)[0].log_softmax(-1)
               .gather(1, batch.tokens[example][:, None])[where].mean() for s in (1, 3)]
        assert float(gain.sel(t=1.0, example=example)) == pytest.approx(float(nll[0] - nll[1]), abs=1e-4)


def test_mask_attention_is_the_patterns(models: dict[str, Entry], measured: dict[str, xr.Dataset]) -> None:
    entry, flow = models["loop"], measured["attention"].flow
    batch = entry.task.sample(6, seed=0, split="test")
    noised = corrupt(batch.tokens, 0.5, entry.task.mask_token_id, free=batch.free,
                     generator=torch.Generator().manual_seed(0))
    whole = patterns(entry.model, noised, n_loops=6, layers=[1, 2], t=0.5)
    masked = (noised == entry.task.mask_token_id).numpy()
    assert flow.loop.values.tolist() == list(range(1, 7))
    for loop in (1, 6):
        for example in range(6):
            seen = whole.sel(batch=example)[whole.loop.values == loop - 1].values[:, :, masked[example]]
            expected = seen[..., masked[example]].sum(-1).mean()
            assert float(flow.sel(loop=loop, example=example)) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_adaptive_is_forward_adaptive(models: dict[str, Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """At thresholds that a model with random weights passes at one loop or another."""
    monkeypatch.setattr(claims_measure, "THRESHOLDS", tuple(np.linspace(0.3, 2, 12).tolist()))
    entry, data = models["loop"], claims_measure.adaptive_looping(models, SETTING)
    batch = entry.task.sample(12, seed=0, split="test")
    masked = batch.tokens.masked_fill(batch.free, entry.task.mask_token_id)
    seen = set()
    for threshold in data.threshold.values.tolist():
        logits, used = entry.model.forward_adaptive(masked, threshold=threshold, max_loops=3, t=1.0)
        assert data.loops_used.sel(threshold=threshold).values.tolist() == used.tolist()
        seen |= set(used.tolist())
        score = entry.task.score(logits.argmax(-1), batch)
        np.testing.assert_allclose(data.cells.sel(threshold=threshold), score["cells"], rtol=1e-6)
    assert len(seen) > 1, "some thresholds stop early"


def test_sampling_is_the_sampler(models: dict[str, Entry], measured: dict[str, xr.Dataset]) -> None:
    entry, data = models["loop"], measured["sampling"]
    batch = entry.task.sample(6, seed=0, split="test")
    prompt = batch.tokens.masked_fill(batch.free, entry.task.mask_token_id)
    trace = sample(entry.model, prompt, SamplerConfig(n_steps=2, order="confidence", n_loops=3, temperature=0))
    score = entry.task.score(trace[-1].after, batch)
    np.testing.assert_allclose(data.steps_cells.sel(loops=3, n_steps=2), score["cells"], rtol=1e-6)
    calls = [(2 + 2 * s) * n for s, n in zip(data.n_loops.values, data.n_steps_of_plan.values, strict=True)]
    assert all(abs(c - 4 * 8) <= 8 for c in calls), "equal total compute, as near as whole steps allow"


# ------------------------------------------------------------------------ intervals and verdicts


def array(values: Any, *dims: str) -> xr.DataArray:
    return xr.DataArray(np.asarray(values, dtype=float), dims=dims)


def test_interval_over_seeds() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, (4, 50))
    found = quantity("x", array(values, "seed", "example"))
    expected = stats.ttest_1samp(values.mean(1), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.over == "4 seeds"
    missing = quantity("x", array(np.vstack([values, np.full((1, 50), np.nan)]), "seed", "example"))
    assert missing == found, "a seed that was not measured does not count"


def test_interval_over_examples() -> None:
    values = np.random.default_rng(0).normal(1, 1, (1, 400))
    found = quantity("x", array(values, "seed", "example"))
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    assert found.over == "one seed, over 400 examples"


def test_one_number_has_no_interval() -> None:
    found = quantity("x", array([3.0], "seed"), bound=1)
    assert math.isnan(found.low)
    assert found.word == "undecided"
    assert found.text == "x: 3 (no interval, one seed)"
    with pytest.raises(ValueError, match="nothing but NaN"):
        quantity("x", array([np.nan], "seed"))


@pytest.mark.parametrize(("intervals", "word", "in_part"), [
    ([(1, 2)], "holds here", False), ([(-2, -1)], "does not hold here", False), ([(-1, 1)], "undecided", False),
    ([(1, 2), (3, 4)], "holds here", False), ([(1, 2), (-1, 1)], "undecided", False),
    ([(1, 2), (-2, -1)], "does not hold here", True), ([(math.nan, math.nan)], "undecided", False)])
def test_words(intervals: list[tuple[float, float]], word: str, in_part: bool) -> None:
    judgement = Judgement("a", "claim", tuple(Estimate("x", 0, low, high, "3 seeds") for low, high in intervals))
    assert judgement.word == word
    assert judgement.in_part == in_part
    saved = json.loads(json.dumps(judgement.to_dict(), allow_nan=False))
    assert Judgement.from_dict(saved).to_dict() == judgement.to_dict()


def test_told_but_not_judged() -> None:
    judgement = Judgement("a", "claim", (Estimate("x", 1, 1, 2, ""), Estimate("y", -9, -9, -9, "", bound=None)))
    assert judgement.word == "holds here"
    assert Judgement("a", "claim", (Estimate("x", 1, 1, 2, ""),), missing="no twin").word == "undecided"


def planted(pooled: dict[str, xr.Dataset], sign: float) -> dict[str, xr.Dataset]:
    """Measurements in which every claim holds clearly (sign 1) or fails clearly (−1)."""
    data = {name: value.copy(deep=True) for name, value in pooled.items()}
    jitter = xr.DataArray([-0.001, 0.0, 0.001], dims="seed")
    data["training"]["flops_ratio"] = data["training"].flops_ratio * 0 + 1 + sign * 0.5 + jitter
    data["training"]["flops_ratio_side"] = data["training"].flops_ratio_side * 0
    base = xr.zeros_like(data["loops"].nelbo) + jitter * xr.where(data["loops"].kind == "loop", 1, 0)
    order = xr.DataArray(np.arange(base.sizes["n_loops"]), dims="n_loops")
    kind = xr.DataArray([{"loop": 0.0, "twin": 5.0, "deep": 15.0}[k] for k in base.kind.values], dims="kind")
    data["loops"]["nelbo"] = base * (1 + order) + sign * (kind - order * (kind == 0) + 10 * (kind == 0))
    data["loops"]["exact"] = base + sign * 0.1 * (kind == 0)
    data["loops"]["cells"] = base + 0.05 * order   # loops matter, so that stopping early could lose something
    t = data["noise"].t
    data["noise"]["gain"] = data["noise"].gain.fillna(0) * 0 + sign * (1 - 2 * abs(t - 0.5)) + jitter * abs(t - 0.5)
    loop = data["attention"].loop
    data["attention"]["flow"] = data["attention"].flow * 0 + sign * xr.where(loop < 3, loop, 3) / 10 + jitter * loop
    used = xr.where(data["adaptive"].threshold > 0, 1 if sign > 0 else 3, 3)
    data["adaptive"]["loops_used"] = data["adaptive"].loops_used * 0 + used + jitter * (used == 1)
    data["adaptive"]["cells"] = data["adaptive"].cells * 0 + 0.5
    data["adaptive"]["exact"] = data["adaptive"].exact * 0 + 0.5
    plan, steps = data["sampling"].equal_exact, data["sampling"].steps_exact
    data["sampling"]["equal_exact"] = plan * 0 + sign * 0.1 * plan.plan + jitter * plan.plan
    few = (steps.n_steps == 1) * (steps.loops == 3)
    data["sampling"]["steps_exact"] = steps * 0 + sign * 0.3 * few + jitter * few
    return data


@pytest.mark.parametrize(("sign", "word"), [(1.0, "holds here"), (-1.0, "does not hold here")])
def test_verdicts_follow_planted_effects(measured: dict[str, xr.Dataset], sign: float, word: str) -> None:
    pooled = planted(pool({0: measured, 1: measured, 2: measured}), sign)
    words = {letter: judgement.word for letter, judgement in judge(pooled).items()}
    assert words == dict.fromkeys("abcdefg", word)


def test_pool_keeps_what_some_seeds_lack(measured: dict[str, xr.Dataset]) -> None:
    without = {name: data.sel(kind=["loop", "twin"]) if "kind" in data.dims else data
               for name, data in measured.items()}
    pooled = pool({0: measured, 1: without})
    assert pooled["loops"].exact.sel(kind="deep", seed=1).isnull().all()
    judged = judge(pooled)
    assert judged["b"].quantities[0].over == "one seed, over 12 examples"
    assert judged["a"].quantities[0].over == "geometric mean of 2 seeds"
    none = judge(pool({0: without}))
    assert none["b"].missing == "no deep twin was trained."
    assert none["b"].word == "undecided"


def test_looping_that_gains_nothing_decides_nothing_about_stopping_early(measured: dict[str, xr.Dataset]) -> None:
    pooled = pool({0: measured})
    for name in ("cells", "exact"):
        pooled["loops"][name][:] = 0.3
        pooled["adaptive"][name][:] = 0.3
    judged = judge(pooled)["f"]
    assert judged.word == "undecided"
    assert "nothing to lose" in judged.missing
    pooled["loops"]["cells"].loc[{"n_loops": 1}] = 0.1
    assert judge(pooled)["f"].missing == ""
