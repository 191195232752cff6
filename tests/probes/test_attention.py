"""Attention: patterns as recorded, summaries and distances against formulas written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from hooks import SiteError
from probes import attention, attention_summary, pattern_distance, patterns
from tests.small import MASK, small_model, small_tokens

N_LOOPS = 3


def plant(*chosen: Tensor) -> list[tuple[str, object]]:
    """Hooks that put given patterns [query, key] at depths 0, 1, … in place of the model's own."""
    topology = small_model().config.topology(N_LOOPS)

    def put(pattern: Tensor) -> object:
        return lambda activation, hook: pattern.expand_as(activation).clone()

    return [(topology.site_at(depth, "attn.hook_pattern"), put(p)) for depth, p in enumerate(chosen)]


def test_patterns_are_those_that_were_recorded_and_rows_sum_to_1() -> None:
    model, noised = small_model(), small_tokens()
    held = patterns(model, noised, n_loops=N_LOOPS)
    _, rec = model.run_with_cache(noised, N_LOOPS, names_filter="blocks.*.attn.hook_pattern")
    assert held.dims == ("depth", "batch", "head", "query", "key")
    np.testing.assert_array_equal(held.isel(depth=4), rec["blocks.2.attn.hook_pattern@1"].detach())
    np.testing.assert_allclose(held.sum("key"), 1, rtol=1e-5)


def test_patterns_of_some_layers_loops_and_examples() -> None:
    model, noised = small_model(time_conditioning="t"), small_tokens()
    t = torch.tensor([0.1, 0.5, 0.9])
    every = patterns(model, noised, n_loops=N_LOOPS, t=t)
    some = patterns(model, noised, n_loops=N_LOOPS, layers=[0, 2], loops=[-1], batch=[2, 0], t=t)
    assert list(zip(some.layer.values.tolist(), some.loop.values.tolist(), strict=True)) == [(0, -1), (2, 2)]
    assert some.batch.values.tolist() == [2, 0]
    np.testing.assert_allclose(some, every.sel(depth=some.depth).isel(batch=[2, 0]), atol=1e-6)
    with pytest.raises(SiteError, match="does not run"):
        patterns(model, noised, n_loops=N_LOOPS, layers=[1], loops=[3])


def test_a_summary_is_its_definitions_written_out() -> None:
    model, noised = small_model(), small_tokens()
    noised[1] = MASK                                             # an example without visible positions
    summary = attention_summary(model, noised, n_loops=N_LOOPS, per_example=True)
    every = patterns(model, noised, n_loops=N_LOOPS).to_numpy().astype(float)
    n_pos = noised.shape[1]
    members = {"masked": (noised == MASK).numpy(), "visible": (noised != MASK).numpy()}
    for depth, example, head in np.ndindex(every.shape[:3]):
        a, here = every[depth, example, head], summary.isel(depth=depth, batch=example, head=head)
        row_entropy = -(a * np.log(a)).sum(1)
        column = a.mean(0)
        np.testing.assert_allclose(here.entropy, row_entropy.mean(), rtol=1e-5)
        np.testing.assert_allclose(here.column_concentration, 1 + (column * np.log(column)).sum() / np.log(n_pos),
                                   atol=1e-5)
        np.testing.assert_allclose(here.sink_rate, (column >= 0.3).mean())
        for query_role, queries in members.items():
            if not queries[example].any():
                assert np.isnan(here.flow.sel(query_role=query_role)).all()
                continue
            np.testing.assert_allclose(here.entropy_by_role.sel(query_role=query_role),
                                       row_entropy[queries[example]].mean(), rtol=1e-5)
            for key_role, keys in members.items():
                flow = a[queries[example]][:, keys[example]].sum(1).mean()
                place = {"query_role": query_role, "key_role": key_role}
                np.testing.assert_allclose(here.flow.sel(place), flow, rtol=1e-5)
                share = keys[example].mean()
                np.testing.assert_allclose(here.flow_over_chance.sel(place), flow / share if share else np.nan,
                                           rtol=1e-5)


def test_flows_over_key_roles_sum_to_1_and_means_leave_out_what_is_undefined() -> None:
    model, noised = small_model(), small_tokens()
    noised[1] = MASK
    mean = attention_summary(model, noised, n_loops=N_LOOPS)
    one_by_one = attention_summary(model, noised, n_loops=N_LOOPS, per_example=True)
    np.testing.assert_allclose(mean.flow.sum("key_role"), 1, rtol=1e-5)
    assert mean.flow.dims == ("depth", "head", "query_role", "key_role")
    for name in mean.data_vars:
        np.testing.assert_allclose(mean[name], one_by_one[name].mean("batch"), rtol=1e-4, atol=1e-6)
    assert mean.entropy.attrs["units"] == "nat"
    assert not any(point.entries for point in model.hook_points.values())


def test_known_patterns_have_known_summaries() -> None:
    noised = small_tokens()
    uniform, one_key = torch.full((9, 9), 1 / 9), torch.zeros(9, 9)
    one_key[:, 0] = 1                                            # position 0 is masked in every example
    model = small_model()
    with model.hooks(plant(uniform, one_key), n_loops=N_LOOPS):  # type: ignore[arg-type]
        summary = attention_summary(model, noised, n_loops=N_LOOPS)
    even, sink = summary.isel(depth=0), summary.isel(depth=1)
    np.testing.assert_allclose(even.flow_over_chance, 1, rtol=1e-5)
    np.testing.assert_allclose(even.entropy, np.log(9), rtol=1e-5)
    np.testing.assert_allclose(even.column_concentration, 0, atol=1e-5)
    np.testing.assert_allclose(even.sink_rate, 0)
    np.testing.assert_allclose(sink.flow.sel(key_role="masked"), 1)
    np.testing.assert_allclose(sink.entropy, 0)
    np.testing.assert_allclose(sink.column_concentration, 1, atol=1e-6)
    np.testing.assert_allclose(sink.sink_rate, 1 / 9, rtol=1e-6)


def test_distances_agree_with_plain_formulas() -> None:
    model, noised = small_model(), small_tokens()
    distance = pattern_distance(model, noised, n_loops=N_LOOPS)
    every = patterns(model, noised, n_loops=N_LOOPS).to_numpy().astype(float)
    for i, j in [(0, 1), (2, 4), (6, 3), (7, 0)]:
        a, b = every[i], every[j]
        norms = np.linalg.norm(a, axis=(2, 3)) ** 2, np.linalg.norm(b, axis=(2, 3)) ** 2
        frobenius = np.linalg.norm(a - b, axis=(2, 3)) / np.sqrt(norms[0] + norms[1])
        np.testing.assert_allclose(distance.frobenius_by_example[:, i, j], frobenius.mean(1), rtol=1e-5)
        divergence = jensenshannon(a, b, axis=-1) ** 2
        np.testing.assert_allclose(distance.jensen_shannon_by_example[:, i, j], divergence.mean((1, 2)), rtol=1e-4)


def test_a_pattern_is_at_distance_0_from_itself_and_furthest_from_a_disjoint_one() -> None:
    first, second = torch.zeros(9, 9), torch.zeros(9, 9)
    first[:, :4], second[:, 4:] = 1 / 4, 1 / 5
    model = small_model()
    with model.hooks(plant(first, second, first), n_loops=N_LOOPS):  # type: ignore[arg-type]
        distance = pattern_distance(model, small_tokens(), n_loops=N_LOOPS)
    np.testing.assert_array_equal(np.diagonal(distance.frobenius), 0)
    np.testing.assert_array_equal(np.diagonal(distance.jensen_shannon), 0)
    np.testing.assert_array_equal(distance.frobenius[0, 2], 0)
    np.testing.assert_allclose(distance.jensen_shannon[0, 2], 0, atol=1e-6)
    np.testing.assert_allclose(distance.frobenius[0, 1], 1, rtol=1e-6)
    np.testing.assert_allclose(distance.jensen_shannon[0, 1], np.log(2), rtol=1e-6)
    for name in ("frobenius", "jensen_shannon"):
        np.testing.assert_array_equal(distance[name], distance[name].T)
        np.testing.assert_allclose(distance[name], distance[f"{name}_by_example"].mean("batch"), rtol=1e-5)
        np.testing.assert_array_equal(distance[name].layer_b, distance[name].layer.values)


def test_examples_taken_in_chunks_give_the_same_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noised, t = small_model(time_conditioning="t"), small_tokens(), torch.tensor([0.1, 0.5, 0.9])
    whole = pattern_distance(model, noised, n_loops=N_LOOPS, t=t)
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 1)
    in_chunks = pattern_distance(model, noised, n_loops=N_LOOPS, t=t)
    for name in whole.data_vars:
        np.testing.assert_allclose(in_chunks[name], whole[name], atol=1e-5)
