"""Figures as functions of data: what is drawn is what was measured, and every axis says what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import xarray as xr

from app.figures.attention import flow_curves, pattern_maps, summary_curves
from app.figures.denoise import confidence_grid, loop_changes, step_costs
from app.figures.dynamics import class_grid, distance_grid, over_loops, trajectories
from app.figures.grids import Look, Panel, mask_editor, token_grids, value_grids
from app.figures.lens import COLOURS, lens_grid, region_curves
from app.figures.probes import VALUES, probe_curves, probe_grid
from app.figures.style import depth_axis, depth_names, ramp, region_ticks
from hooks.model.diffusion import SamplerConfig, sample
from probes import (
    attention_summary,
    classify_tokens,
    dynamics,
    fixed_point,
    patterns,
    probe_latent,
    read_lens,
    trajectory_pca,
)
from tests.small import MASK, small_model, small_tokens

N_LOOPS, REGIONS = 3, np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
LOOK = Look((3, 3), [*"abcdef", "■"], [f"cell {i}" for i in range(9)])
BINARY = Look((3, 3), ["0", "1", "■"], [f"cell {i}" for i in range(9)])


@pytest.fixture(scope="module")
def noised() -> torch.Tensor:
    return small_tokens()


@pytest.fixture(scope="module")
def clean(noised: torch.Tensor) -> torch.Tensor:
    return torch.where(noised == MASK, 2, noised)


@pytest.fixture(scope="module")
def lens(noised: torch.Tensor, clean: torch.Tensor) -> xr.Dataset:
    return read_lens(small_model(), noised, n_loops=N_LOOPS, kind="coda", targets=clean, top_k=3).isel(batch=0)


def corners(trace: go.Scatter) -> set[tuple[int, int]]:
    """(x, y) of the cells that corner marks are in; each is an outline of four points and a gap."""
    x, y = (np.asarray(values, dtype=float).reshape(-1, 5) for values in (trace.x, trace.y))
    assert np.isnan(x[:, 4]).all()
    cells = np.stack([x[:, :4].mean(1).round(), y[:, :4].mean(1).round()], 1)
    inside = (np.abs(x[:, :4] - cells[:, :1]) <= 0.5) & (np.abs(y[:, :4] - cells[:, 1:]) <= 0.5)
    assert inside.all(), "a mark stays in its cell"
    return {(int(i), int(j)) for i, j in cells}


def covers_the_middle(trace: go.Scatter) -> bool:
    """Whether any corner mark reaches the middle of its cell, where the cell's token is written."""
    x, y = (np.asarray(values, dtype=float).reshape(-1, 5)[:, :4] for values in (trace.x, trace.y))
    return bool(((x.min(1) <= x.mean(1).round()) & (y.max(1) >= y.mean(1).round())).any())


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("positions", [list(range(9)), [5, 6], list(range(9)) * 4])
def test_the_lens_grid_shows_the_lens(lens: xr.Dataset, clean: torch.Tensor, noised: torch.Tensor, colour: str,
                                      positions: list[int]) -> None:
    tokens, asked = clean[0].numpy(), (noised[0] == MASK).numpy()[positions]
    assert asked.any()
    figure = lens_grid(lens, colour, LOOK, tokens=tokens, positions=positions, region_name="row", regions=REGIONS)
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z[asked], lens[colour].values.T[positions][asked])
    assert np.isnan(heat.z[~asked]).all(), "what was not asked has no value"
    predicted = lens.prediction.values.T[positions]
    assert heat.text[asked].tolist() == np.asarray(LOOK.token_names)[predicted][asked].tolist()
    assert (heat.texttemplate is not None) == (len(positions) <= 26)
    expected = {(d, i) for i, p in enumerate(positions) for d in range(lens.sizes["depth"])
                if asked[i] and lens.prediction.values[d, p] != tokens[p]}
    wrong = next(trace for trace in figure.data if trace.name == "prediction is wrong")
    assert corners(wrong) == expected
    assert not covers_the_middle(wrong), "the wrong token stays readable"
    assert f"cell {positions[0]}" in heat.customdata[0][0]
    assert figure.layout.xaxis.title.text == "layer"
    if colour == "nll":
        assert heat.zmid == pytest.approx(np.log(6))   # white is a uniform guess among six tokens


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("n_asked", [0, 4, 9])
def test_positions_that_were_not_asked_are_grey_and_show_what_stands_there(lens: xr.Dataset, clean: torch.Tensor,
                                                                           colour: str, n_asked: int) -> None:
    tokens, asked = clean[0].numpy(), np.arange(9) < n_asked
    figure = lens_grid(lens.assign_coords(scored=("pos", asked)), colour, LOOK, tokens=tokens, positions=range(9),
                       region_name="row", regions=REGIONS)
    grey = [trace for trace in figure.data if trace.name == "not asked"]
    assert len(grey) == (n_asked < 9)
    for trace in grey:
        assert (np.isfinite(trace.z).all(1) == ~asked).all()
        assert len({colour for _, colour in trace.colorscale}) == 1
        red, green, blue = (int(trace.colorscale[0][1][i:i + 2], 16) for i in (1, 3, 5))
        assert max(red, green, blue) - min(red, green, blue) < 12, "grey"
        assert trace.text[~asked].tolist() == [[LOOK.token_names[t]] * lens.sizes["depth"] for t in tokens[~asked]]
        assert "visible" in trace.customdata[8][0], "and says so under the pointer"
        assert any(key.showlegend is not False and "not asked" in str(key.name) and key.type == "scatter"
                   for key in figure.data)
    assert np.isfinite([figure.data[0].zmin, figure.data[0].zmax]).all(), "a scale also where nothing is asked"


def test_words_too_long_for_their_cell_are_cut_or_left_out(lens: xr.Dataset, clean: torch.Tensor) -> None:
    look = Look((1, 9), ["a", "representative", *"cdef", "■"], [f"token {i}" for i in range(9)])
    tokens = np.full(9, 1)
    one = np.zeros(9, dtype=int)

    def drawn(depths: int) -> go.Figure:
        deep = lens.isel(depth=np.arange(depths) % lens.sizes["depth"])
        deep["prediction"] = deep.prediction * 0 + 1
        return lens_grid(deep, "nll", look, tokens=tokens, positions=range(9), region_name="text", regions=one)

    few = drawn(8).data[0]
    asked = np.isfinite(few.z)
    assert set(few.text[asked]) == {"repre…"}
    assert few.texttemplate
    assert drawn(60).data[0].texttemplate is None, "too narrow for six letters"


def test_a_task_of_one_region_shows_its_tokens_in_every_row(lens: xr.Dataset, clean: torch.Tensor) -> None:
    """There is no smaller part to choose."""
    positions = list(range(9)) * 7
    for regions, shown in ((np.zeros(9, dtype=int), True), (REGIONS, False)):
        figure = lens_grid(lens, "nll", LOOK, tokens=clean[0].numpy(), positions=positions, region_name="row",
                           regions=regions)
        assert (figure.data[0].texttemplate is not None) == shown


def test_region_curves_average_masked_positions(lens: xr.Dataset) -> None:
    figure = region_curves(lens, "nll", REGIONS, "row")
    masked = lens.scored.values
    shown = {trace.name: trace.y for trace in figure.data}
    assert set(shown) == {f"row {r}" for r in np.unique(REGIONS[masked])}
    for r in np.unique(REGIONS[masked]):
        np.testing.assert_allclose(shown[f"row {r}"], lens.nll.values[:, masked & (r == REGIONS)].mean(1))
    assert "[nat]" in figure.layout.yaxis.title.text


@pytest.mark.parametrize("look", [LOOK, BINARY])
def test_token_grids_draw_tokens_and_mark_what_is_wrong(look: Look) -> None:
    tokens = np.array([0, 1, look.mask, 0, 1, 0, 1, 1, 0])
    wrong = np.zeros(9, dtype=bool)
    wrong[[1, 5]] = True
    figure = token_grids([Panel("a", tokens, wrong=wrong), Panel("b", tokens)], look, columns=2)
    heats = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(heats) == 2
    assert [name for row in heats[0].text for name in row] == [look.token_names[t] for t in tokens]
    mark = next(trace for trace in figure.data if trace.name == "wrong" and trace.x[0] is not None)
    assert corners(mark) == {(1, 0), (2, 1)}
    assert not covers_the_middle(mark), "the wrong token stays readable"
    assert [note.text for note in figure.layout.annotations] == ["a", "b"]


@pytest.mark.parametrize(("n", "names", "shape", "letters"), [
    (7, "ab■", (1, 7), 0), (26, "abc■", (3, 9), 1), (56, "abcdefgh■", (5, 12), 1),
    (20, ["to", "representative", "■"], (2, 10), 0), (20, ["to", "a", "representative", "■"], (3, 7), 6)])
def test_a_line_of_tokens_is_broken_like_text(n: int, names: Sequence[str], shape: tuple[int, int],
                                              letters: int) -> None:
    look = Look((1, n), list(names), [f"token {i}" for i in range(n)])
    assert look.shape == shape
    assert look.letters == letters
    tokens = np.arange(n) % (len(names) - 1)
    wrong = np.arange(n) == n - 1
    figure = token_grids([Panel("a", tokens, wrong=wrong)], look)
    text = figure.data[0].text.flatten()
    assert list(text[:n]) == [names[t] if len(names[t]) <= 6 else f"{names[t][:5]}…" for t in tokens]
    assert set(text[n:]) <= {""}
    assert np.isnan(figure.data[0].z.flatten()[n:].astype(float)).all()
    assert figure.data[0].customdata.reshape(-1, 2)[n - 1].tolist() == [f"token {n - 1}", names[tokens[-1]]]
    mark = next(trace for trace in figure.data if trace.name == "wrong" and trace.x[0] is not None)
    assert corners(mark) == {divmod(n - 1, shape[1])[::-1]}
    assert not covers_the_middle(mark)
    board = mask_editor(tokens, wrong, wrong, look).data[0]
    assert list(zip(board.y, board.x, strict=True)) == [divmod(i, shape[1]) for i in range(n)]
    values = value_grids([np.arange(n) / n], ["x"], look, bar="share", zmax=1.0).data[0].z.flatten()
    assert np.allclose(values[:n], np.arange(n) / n)


def test_region_labels_are_as_many_as_fit() -> None:
    starts, roomy = region_ticks(REGIONS, pixels=300)
    assert (starts, roomy["tickvals"], roomy["ticktext"]) == ([0, 3, 6], [1, 4, 7], ["0", "1", "2"])
    every = region_ticks(np.arange(100), pixels=300)[1]["tickvals"]
    assert every == list(range(0, 100, 4))


def test_the_board_has_one_point_per_position_in_order() -> None:
    free = np.array([False] * 3 + [True] * 6)
    hidden = np.array([False] * 5 + [True] * 4)
    figure = mask_editor(np.array([0, 1, 0] * 3), hidden, free, BINARY)
    board = figure.data[0]
    assert list(zip(board.y, board.x, strict=True)) == [divmod(i, 3) for i in range(9)]
    says = [state for _, state, _ in board.customdata]
    assert says[0].startswith("given")
    assert "click to mask" in says[3]
    assert "click to show" in says[8]
    assert len({board.marker.color[i] for i in (5, 6, 7, 8)}) == 1


def test_value_grids_share_one_scale() -> None:
    values = [np.arange(9) / 36, np.arange(9)[::-1] / 36]
    figure = value_grids(values, ["x", "y"], LOOK, bar="attention", zmax=0.25, marked=4)
    heats = [trace for trace in figure.data if trace.type == "heatmap"]
    np.testing.assert_array_equal([trace.z for trace in heats], [v.reshape(3, 3) for v in values])
    assert {trace.coloraxis for trace in heats} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 0.25)


def test_trajectories_follow_each_position(noised: torch.Tensor) -> None:
    model = small_model()
    _, rec = model.run_with_cache(noised, N_LOOPS, names_filter="blocks.*.hook_resid_post")
    pca = trajectory_pca(rec.residual_stream()).isel(batch=0)
    figure = trajectories(pca, REGIONS, "row", positions=[0, 4], layer=2, components=(0, 2))
    path = next(trace for trace in figure.data if trace.name == "row 1" and trace.mode == "lines+markers")
    depths = np.nonzero(pca.layer.values == 2)[0]
    np.testing.assert_allclose(path.x[:-1], pca.coordinates.values[depths, 4, 0])
    np.testing.assert_allclose(path.y[:-1], pca.coordinates.values[depths, 4, 2])
    assert "principal component 3" in figure.layout.yaxis.title.text
    every = trajectories(pca, REGIONS, "row", positions=[4], layer=None)
    assert len(every.data[0].x) == pca.sizes["depth"] + 1


def test_curves_over_loops_are_medians_of_the_chosen_positions(noised: torch.Tensor) -> None:
    model = small_model()
    _, rec = model.run_with_cache(noised, 6, names_filter="blocks.*.hook_resid_post")
    moves = dynamics(rec.residual_stream(), rec.topology, fixed_point=fixed_point(model, noised)).isel(batch=0)
    where = np.array([True, False, True] * 3)
    figure = over_loops(moves.step_relative, where, log=True)
    line = next(trace for trace in figure.data if trace.name == "layer 2, median")
    np.testing.assert_allclose(line.y, np.median(moves.step_relative.sel(layer=2).values[1:, where], axis=1))
    assert list(line.x) == [1, 2, 3, 4, 5]
    grid = distance_grid(moves.distance_to_fixed_point.sel(layer=2), REGIONS, "row", list(LOOK.position_names))
    np.testing.assert_allclose(10 ** grid.data[0].z.T, moves.distance_to_fixed_point.sel(layer=2), rtol=1e-6)


def test_classes_are_drawn_by_name(noised: torch.Tensor) -> None:
    model = small_model()
    _, rec = model.run_with_cache(noised, 8, names_filter="blocks.*.hook_resid_post")
    classes = classify_tokens(rec.residual_stream(), rec.topology).token_class.isel(batch=0)
    figure = class_grid(classes, LOOK)
    names = [name.replace("_", " ") for name in classes.attrs["flag_meanings"].split()]
    assert [cell for row in figure.data[0].text for cell in row] == [names[c] for c in classes.values[0]]


def test_attention_figures(noised: torch.Tensor) -> None:
    model = small_model()
    pattern = patterns(model, noised, n_loops=N_LOOPS).isel(batch=0)
    figure = pattern_maps(pattern.values[0], ["head 0", "head 1"], REGIONS, "row", names=LOOK.position_names)
    np.testing.assert_allclose(figure.data[1].z, pattern.values[0, 1], atol=1e-4)
    summary = attention_summary(model, noised, n_loops=N_LOOPS)
    flow = flow_curves(summary, "masked", "visible", over_chance=False)
    np.testing.assert_allclose(flow.data[1].y, summary.flow.sel(query_role="masked", key_role="visible").values[:, 1])
    np.testing.assert_allclose(flow.data[-1].y, np.mean([trace.y for trace in flow.data[:-1]], axis=0))
    assert "nat" in summary_curves(summary.entropy).layout.yaxis.title.text


@pytest.mark.parametrize("value", VALUES)
def test_probe_figures(value: str) -> None:
    tokens = small_tokens(batch=40)
    labels = (tokens * 7 + torch.arange(9)) % 2
    result = probe_latent(small_model(), tokens, labels, 2, n_loops=N_LOOPS, groups=torch.from_numpy(REGIONS))
    grid = probe_grid(result, value, "row")
    np.testing.assert_allclose(grid.data[0].z, result[value].values.T)
    curves = probe_curves(result, value, "row")
    np.testing.assert_allclose(curves.data[2].y, result[value].values[:, 2])
    if value != "control_accuracy":
        high = np.asarray(curves.data[0].y) + curves.data[0].error_y.array
        np.testing.assert_allclose(high, result[f"{value}_high"].values[:, 0], atol=1e-6)


def test_sampler_figures(noised: torch.Tensor) -> None:
    steps = sample(small_model(), noised[:1], SamplerConfig(n_steps=3, n_loops=2))
    names = ("before", "after", "predicted", "probability", "loops_used", "revealed")
    trace = [{name: getattr(step, name).numpy() for name in names} for step in steps]
    costs = step_costs(trace, {"revealed": np.array([0.2, 0.5, 1]), "right": np.array([0.1, 0.3, 0.6])}, current=1,
                       max_loops=2)
    assert list(costs.data[0].y) == [2, 2, 2]
    grid = confidence_grid(trace, REGIONS, "row", LOOK.position_names, n_tokens=MASK, current=0)
    visible = (noised[0] != MASK).numpy()
    assert np.isnan(grid.data[0].z[visible]).all()
    np.testing.assert_allclose(grid.data[0].z[~visible, 0], trace[0]["probability"][0][~visible])
    assert len(grid.data[1].x) == (~visible).sum()


def test_a_loop_that_did_not_run_has_no_change() -> None:
    trace = [{"change": np.array([np.nan, 0.5, 0.25])}, {"change": np.array([np.nan, 0.125])}]
    figure = loop_changes(trace, current=1)
    np.testing.assert_array_equal(figure.data[0].z, [[0.5, 0.125], [0.25, np.nan]])
    np.testing.assert_array_equal(figure.data[0].y, [1, 2])


def test_depths_are_named_by_layer_and_loop() -> None:
    layer, loop = [0, 1, 2, 1, 2, 3], [-1, 0, 0, 1, 1, -1]
    assert depth_names(layer, loop) == ["layer 0 (head)", "layer 1, loop 0", "layer 2, loop 0", "layer 1, loop 1",
                                        "layer 2, loop 1", "layer 3 (tail)"]
    figure = depth_axis(go.Figure(), layer, loop)
    assert list(figure.layout.xaxis.ticktext) == [str(k) for k in layer]
    assert [note.text for note in figure.layout.annotations] == ["head", "loop 0", "loop 1", "tail"]
    assert [shape.x0 for shape in figure.layout.shapes] == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("make", [lambda: ramp(1), lambda: ramp(8)])
def test_lines_of_a_ramp_differ(make: Callable[[], list[str]]) -> None:
    colours = make()
    assert len(set(colours)) == len(colours)
