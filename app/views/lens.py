"""Lens: what the model would answer from its state after every layer of every loop, computed live.

Click cells of the example to mask or show them; the answers follow.
"""

from __future__ import annotations

import numpy as np
import streamlit as st
import xarray as xr

from app import compute, selection, show
from app.figures.grids import Look, Panel, mask_editor, token_grids
from app.figures.lens import COLOURS, lens_grid, region_curves
from app.selection import Scene
from hooks.model.diffusion import T_MIN
from probes.lenses import LensKind

KINDS: dict[str, LensKind] = {"coda lens": "coda", "logit lens": "logit"}
WHAT = {"coda": "runs the layers after the loops on the state first: what would the model answer if it stopped here?",
        "logit": "reads the state directly with the unembedding, without any further layer."}


def main() -> None:
    scene = selection.choose()
    look = Look.of(scene.task)
    st.title("Lens: what would it answer here?", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        kind = KINDS[st.segmented_control("Lens", list(KINDS), default="coda lens", required=True, key="lens",
                                          bind="query-params")]
        colour_names = {name: key for key, name in COLOURS.items()}
        colour = colour_names[st.segmented_control("Colour", list(colour_names), default=COLOURS["nll"],
                                                   required=True, key="colour", bind="query-params")]
    st.markdown(f"The **{kind} lens** {WHAT[kind]}")
    lens = compute.lens_of(scene.checkpoint, compute.rows(scene.noised), compute.rows(scene.tokens), scene.n_loops,
                           scene.t, kind).isel(batch=0)
    left, right = st.columns([1, 2.1], gap="large")
    with left:
        _editor(scene, look)
    with right:
        _stages(scene, look, lens)
    _grid(scene, look, lens, colour)
    _curves(scene, lens, colour)


def _region(scene: Scene) -> int | None:
    """The region to show, None for all; there is nothing to choose where the task has but one."""
    name = scene.task.region_name
    numbers = [int(r) for r in scene.task.regions().unique()]
    if len(numbers) == 1:
        return None
    choice = st.selectbox("Positions", [f"every {name}", *(f"{name} {r}" for r in numbers)], key="positions",
                          bind="query-params", width=180, label_visibility="collapsed")
    return None if str(choice).startswith("every") else int(str(choice).split()[-1])


def _editor(scene: Scene, look: Look) -> None:
    """The example to click on. Its key changes with the mask, so that no selection outlives the click."""
    st.subheader("What it sees", anchor=False)
    st.caption(":material/touch_app: Click a cell to mask it or to show it; for a whole area take the box from the "
               "figure's toolbar. Ringed cells are given.")
    drawn = mask_editor(scene.tokens.numpy(), scene.hidden.numpy(), scene.free.numpy(), look)
    key = f"editor-{scene.name}-{scene.example}-{selection.encode_mask(scene.hidden)}"

    def clicked() -> None:
        points = st.session_state[key].selection.points
        selection.flip(scene, [point["point_index"] for point in points if point["curve_number"] == 0])

    st.plotly_chart(drawn, theme=None, width="content", key=key, on_select=clicked, selection_mode=("points", "box"),
                    config={"displaylogo": False, "modeBarButtons": [["select2d", "pan2d"]]},
                    alt="The example with its mask, as a grid of cells to click on")
    with st.container(horizontal=True, gap="small"):
        for label, hidden in (("Mask all", scene.free), ("Show all", ~scene.free & False),
                              ("Invert", ~scene.hidden & scene.free)):
            st.button(label, key=f"mask-{label}", on_click=selection.draw_mask, args=(hidden,))


def _stages(scene: Scene, look: Look, lens: xr.Dataset) -> None:
    """The predicted grid at the end of each loop, beside the truth."""
    loop, truth, hidden = lens.loop.values, scene.tokens.numpy(), scene.hidden.numpy()
    if scene.n_loops > 1:
        ends = [int(np.nonzero(loop == k)[0][-1]) for k in range(scene.n_loops)]
        names = [f"loop {k}" for k in range(scene.n_loops)]
    else:
        ends = list(range(lens.sizes["depth"] - 1))
        names = [f"layer {layer}" for layer in lens.layer.values[ends]]
    panels = []
    for end, name in zip([*ends, lens.sizes["depth"] - 1], [*names, "output"], strict=True):
        answer = np.where(hidden, lens.prediction.values[end], truth)
        right = (answer == truth)[hidden].mean() if hidden.any() else 1.0
        panels.append(Panel(f"{name}<br>{right:.0%}", answer, wrong=answer != truth))
    panels.append(Panel("truth", truth))
    unit = "loop" if scene.n_loops > 1 else "layer"
    show.figure(token_grids(panels, look, columns=5 if len(panels) <= 10 else 7, cell=13 if len(panels) <= 10 else 10),
                f"The example as the {lens.attrs['kind']} lens fills it in after each {unit}; the share is of masked "
                "positions that are right, cells with a red corner are errors.", name="stages",
                title=f"What it answers, {unit} by {unit}",
                table=lambda: show.table_of(lens[["prediction", "probability", "nll"]]))


def _grid(scene: Scene, look: Look, lens: xr.Dataset, colour: str) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
        st.subheader("Every token, every layer, every loop", anchor=False)
        region = _region(scene)
    regions = scene.task.regions().numpy()
    positions = [p for p in range(len(regions)) if region is None or regions[p] == region]
    choose = (f"Choose one {scene.task.region_name} to read the tokens in the cells. "
              if len(set(regions.tolist())) > 1 else "")
    drawn = lens_grid(lens, colour, look, tokens=scene.tokens.numpy(), positions=positions, regions=regions,
                      region_name=scene.task.region_name)
    show.figure(drawn, f"Every position (down) at every layer of every loop (across). Colour: {COLOURS[colour]}"
                + (" (blue is better than a uniform guess, red worse)" if colour == "nll" else "") +
                ". Cells with a dark corner are wrong predictions; hover a cell for the likeliest tokens. "
                f"{choose}Visible positions are grey: the model sees "
                "their tokens and is not asked about them.", name="lens", table=lambda: show.table_of(lens))


def _curves(scene: Scene, lens: xr.Dataset, colour: str) -> None:
    if not scene.hidden.any():
        st.info("Nothing is masked, so there is nothing to answer: mask some cells.", icon=":material/grid_off:")
        return
    region = scene.task.region_name
    drawn = region_curves(lens, colour, scene.task.regions().numpy(), region)
    noise = "all of it" if scene.t == 1 else f"t = {max(scene.t, T_MIN):.2f}"
    show.figure(drawn, f"The same, averaged over the masked positions of each {region} ({noise} masked): when does a "
                       f"{region} "
                f"become answerable? Definition: {lens.attrs['definition']}.", name="lens-regions",
                title=f"{region.capitalize()} by {region}",
                table=lambda: show.table_of(lens[[colour]]))


main()
