"""Attention: who looks at whom, per head, layer and loop, and how it changes over loops."""

from __future__ import annotations

import numpy as np
import streamlit as st
import xarray as xr

from app import compute, selection, show
from app.figures.attention import flow_curves, pattern_maps, summary_curves
from app.figures.grids import Look, value_grids
from app.figures.style import depth_names
from app.selection import Scene

N_AVERAGED = 32   # examples over which flows are averaged


def main() -> None:
    scene = selection.choose()
    st.title("Attention: who looks at whom?", anchor=False)
    pattern = compute.patterns_of(scene.checkpoint, compute.rows(scene.noised), scene.n_loops, scene.t)
    chosen, titles, what = _chosen(scene, pattern)
    look = Look.of(scene.task)
    _gaze(scene, chosen, titles, what, look)
    show.figure(pattern_maps(chosen, titles, scene.task.regions().numpy(), scene.task.region_name,
                             names=scene.task.position_names(), columns=4 if len(titles) <= 8 else 6),
                f"{what} of this example: each row of pixels is a query, each column a key; rows sum to 1. "
                f"Bright diagonals are steps of a fixed length through the sequence, such as one "
                f"{scene.task.region_name} back.",
                name="patterns", title="Whole patterns", table=lambda: show.table_of(pattern.rename("attention")))
    _flows(scene)


def _chosen(scene: Scene, pattern: xr.DataArray) -> tuple[np.ndarray, list[str], str]:
    """([panel, query, key], titles, words): all heads at one place, or one head over the loops of a layer."""
    layers = sorted(set(pattern.layer.values.tolist()))
    looped = set(pattern.layer.values[pattern.loop.values >= 0].tolist())
    heads = [str(h) for h in range(pattern.sizes["head"])]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        layer = int(st.segmented_control("Layer", [str(k) for k in layers], default=str(min(looped)), required=True,
                                         key=f"layer{len(layers)}", bind="query-params"))
        over = "heads"
        if layer in looped and scene.n_loops > 1:
            over = st.segmented_control("Side by side", ["heads", "loops"], default="heads", required=True, key="over",
                                        bind="query-params")
        if over == "loops":
            head = int(st.segmented_control("Head", heads, default="0", required=True, key="head", bind="query-params"))
        elif layer in looped and scene.n_loops > 1:
            if st.session_state.get("loop", 0) >= scene.n_loops:   # it was chosen when there were more
                st.session_state["loop"] = scene.n_loops - 1
            loop = st.slider("Loop", 0, scene.n_loops - 1, key="loop", bind="query-params", width=260)
    if over == "loops":
        depths = np.nonzero(pattern.layer.values == layer)[0]
        return (pattern.values[depths, head], [f"loop {pattern.loop.values[d]}" for d in depths],
                f"Head {head} of layer {layer} in every loop")
    wanted = loop if layer in looped and scene.n_loops > 1 else 0 if layer in looped else -1
    depth = int(np.nonzero((pattern.layer.values == layer) & (pattern.loop.values == wanted))[0][0])
    place = depth_names(pattern.layer.values, pattern.loop.values)[depth]
    return pattern.values[depth], [f"head {h}" for h in heads], f"All heads of {place}"


def _gaze(scene: Scene, chosen: np.ndarray, titles: list[str], what: str, look: Look) -> None:
    rows, columns = look.shape
    start = min((rows // 2) * columns + columns // 2, len(look.position_names) - 1)
    query = st.select_slider("Query position", range(len(look.position_names)), value=start, key="query",
                             bind="query-params",
                             format_func=lambda p: look.position_names[p])
    gaze = chosen[:, query]
    role = "masked" if scene.hidden[query] else "visible"
    show.figure(value_grids(list(gaze), titles, look, bar="attention", zmax=float(gaze.max()), marked=int(query),
                            columns=4 if len(titles) <= 8 else 6, cell=18 if len(titles) <= 8 else 14),
                f"{what}: where {look.position_names[query]} ({role}, ringed) looks, laid out as the example is. "
                "Attention "
                "over all keys sums to 1.", name="gaze", title="Where one position looks",
                table=lambda: _gaze_table(gaze, titles, look))


def _gaze_table(gaze: np.ndarray, titles: list[str], look: Look):
    values = xr.DataArray(gaze, dims=("panel", "key"), coords={"panel": titles, "key": list(look.position_names)},
                          name="attention")
    return show.table_of(values)


def _flows(scene: Scene) -> None:
    _, noised = scene.crowd(N_AVERAGED)
    summary = compute.attention_of(scene.checkpoint, compute.rows(noised), scene.n_loops, scene.t)
    roles = {f"{q} → {k}": (q, k) for q in ("masked", "visible") for k in ("masked", "visible")}
    st.subheader("Flows over loops", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        chosen = st.segmented_control("Attention of … to …", list(roles), default="masked → masked", required=True,
                                      key="flow", bind="query-params")
        over_chance = st.toggle("over chance", value=True, key="chance", bind="query-params",
                                help="Divide by the share of keys in that role: 1 is attention that ignores roles.")
    q, k = roles[chosen]
    left, right = st.columns(2, gap="large")
    with left:
        if np.isfinite(summary.flow.sel(query_role=q, key_role=k).values).any():
            show.figure(flow_curves(summary, q, k, over_chance=over_chance),
                        f"Share of attention that {q} positions give to {k} ones, per head, mean over {N_AVERAGED} "
                        "examples under the same kind of mask.",
                        name="flows", table=lambda: show.table_of(summary[["flow", "flow_over_chance"]]))
        else:
            st.info(f"There are no {q} queries or no {k} keys under this mask.", icon=":material/grid_off:")
    with right:
        show.figure(summary_curves(summary.entropy), "How widely each head spreads its attention: 0 is one key, "
                    f"{np.log(scene.task.seq_len):.1f} nat all {scene.task.seq_len} alike.", name="attention-entropy",
                    table=lambda: show.table_of(summary[["entropy", "column_concentration", "sink_rate"]]))


main()
