"""Dynamics: how the residual stream moves from loop to loop, and whether it settles."""

from __future__ import annotations

import numpy as np
import streamlit as st
import xarray as xr

from app import compute, selection, show
from app.figures.dynamics import class_grid, distance_grid, over_loops, settling_words, trajectories
from app.figures.grids import Look
from app.selection import Scene

ROLES = ("masked", "visible", "all")


def main() -> None:
    scene = selection.choose()
    st.title("Dynamics: where does the state go?", anchor=False)
    st.markdown("Each position's state after a layer is a point; looping moves it. A state that no longer moves has "
                "reached a **fixed point**; one that grows by the same vector in every loop has none, although its "
                "direction settles.")
    config = scene.entry.model.config
    layers = [f"layer {config.n_head_layers + i}" for i in range(config.n_loop_layers)]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        followed = st.segmented_control("Follow", [*layers, "every layer"], default=layers[-1], required=True,
                                        key=f"follow{len(layers)}", bind="query-params") if len(layers) < 5 else \
            st.selectbox("Follow", [*layers, "every layer"], len(layers) - 1, key=f"follow{len(layers)}", width=160,
                         bind="query-params")
        role = st.segmented_control("Positions", list(ROLES), default="all", required=True, key="role",
                                    bind="query-params")
        plane = st.segmented_control("Components", ["1, 2", "1, 3", "2, 3"], default="1, 2", required=True,
                                     key="plane", bind="query-params")
        unit = st.toggle("states of norm 1", value=True, key="unit", bind="query-params",
                         help="Scale every state to norm 1 first. Layers normalise what they read, so its direction is "
                              "what they see; the residual stream itself may keep growing. Off: states as they "
                              "are.")
    where = {"masked": scene.hidden, "visible": ~scene.hidden, "all": scene.hidden | True}[role].numpy()
    if not where.any():
        st.info(f"No position is {role} under this mask.", icon=":material/grid_off:")
        return
    noised = compute.rows(scene.noised)
    moves, pca = (part.isel(batch=0)
                  for part in compute.movement(scene.checkpoint, noised, scene.n_loops, scene.t, unit))
    layer = None if followed == "every layer" else int(followed.split()[-1])
    _paths(scene, pca, where, layer, (int(plane[0]) - 1, int(plane[-1]) - 1))
    if scene.n_loops < 2:
        st.info("Steps and their directions compare one loop with the next: choose at least two loops.",
                icon=":material/footprint:")
    else:
        _steps(moves, where, role)
    _settling(scene, moves, noised, layer)


def _paths(scene: Scene, pca: xr.Dataset, where: np.ndarray, layer: int | None, components: tuple[int, int]) -> None:
    drawn = trajectories(pca, scene.task.regions().numpy(), scene.task.region_name,
                         positions=np.nonzero(where)[0].tolist(), layer=layer, components=components)
    follows = "the state after every layer" if layer is None else f"the state after layer {layer}, from loop to loop"
    show.figure(drawn, f"One path per position: {follows}, in the plane of two principal components of all states. "
                f"Colour is the {scene.task.region_name}; click one in the legend to hide it, twice to see it alone.",
                name="trajectories", title="Paths through state space",
                table=lambda: show.table_of(pca.coordinates.rename("coordinate")))


def _steps(moves: xr.Dataset, where: np.ndarray, role: str) -> None:
    left, right = st.columns(2, gap="large")
    with left:
        show.figure(over_loops(moves.step_relative, where, log=True),
                    "How far the state moves in a loop, relative to its size "
                    f"({moves.step_relative.attrs['definition']}), {role} positions, logarithmic.",
                    name="step-size", title="Step size",
                    table=lambda: show.table_of(moves[["step_norm", "step_relative"]]))
    with right:
        value = moves.step_cosine
        if np.isfinite(value.values[..., where]).any():
            show.figure(over_loops(value, where, zero=True, limits=(-1.05, 1.05)),
                        "Cosine between a loop's step and the one before it: 1 goes straight on, 0 turns at a right "
                        "angle, −1 goes back.", name="step-cosine", title="Step direction",
                        table=lambda: show.table_of(moves[["step_cosine"]]))
        else:
            st.subheader("Step direction", anchor=False)
            st.info("A cosine needs two steps: choose at least three loops.", icon=":material/turn_right:")


def _settling(scene: Scene, moves: xr.Dataset, noised: compute.Rows, layer: int | None) -> None:
    last = float(moves.last_step.max())
    left, right = st.columns(2, gap="large")
    shown = layer if layer is not None else int(moves.layer.values[-1])
    distance = moves.distance_to_fixed_point.sel(layer=shown)
    with left:
        show.figure(distance_grid(distance, scene.task.regions().numpy(), scene.task.region_name,
                                  scene.task.position_names()),
                    f"Distance of layer {shown}'s state to where {compute.FIXED_POINT_LOOPS} loops take it, relative "
                    f"to its size. There the largest remaining step is {last:.1e} of the state's size.",
                    name="distance", title=f"Distance to the state after {compute.FIXED_POINT_LOOPS} loops",
                    table=lambda: show.table_of(distance))
    with right:
        found = compute.token_classes(scene.checkpoint, noised, scene.t).isel(batch=0)
        classes = found.token_class
        show.figure(class_grid(classes, Look.of(scene.task)),
                    "Does a position's state settle, only its direction, or does it cycle or drift? Judged at 32 "
                    f"loops: {classes.attrs['definition']}.", name="classes", title="Settled, cyclic, drifting",
                    table=lambda: show.table_of(found))
    if words := settling_words(found.sel(layer=shown)):
        st.info(f"Layer {shown}, 32 loops, all positions. {words}", icon=":material/trending_up:")


main()
