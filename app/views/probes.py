"""Probes: what can be read off the states by a linear classifier, at which layer and loop."""

from __future__ import annotations

import streamlit as st

from app import compute, selection, show
from app.figures.probes import VALUES, probe_curves, probe_grid

SIZES = {"256": 256, "512": 512, "1024": 1024}


def main() -> None:
    scene = selection.choose()
    region = scene.task.region_name
    st.title("Probes: what can be read, and when?", anchor=False)
    st.markdown(f"A linear classifier is trained on the states of one {region} at one layer of one loop, and tested on "
                "**examples it has not seen**. A **control task** with random answers can only be memorised: "
                "*selectivity* is the accuracy above the control task's.")
    latents = scene.task.latents(scene.batch.tokens)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        latent = st.segmented_control("Latent variable", list(latents), default=next(iter(latents)), required=True,
                                      key="latent", bind="query-params")
        names = {name: key for key, name in VALUES.items()}
        value = names[st.segmented_control("Show", list(names), default="accuracy", required=True, key="value",
                                           bind="query-params")]
        size = SIZES[st.segmented_control("Examples", list(SIZES), default="256", required=True, key="crowd",
                                          bind="query-params", help="A quarter of them are held out for testing.")]
    st.caption(f"*{latent}*: {latents[latent].description}, {latents[latent].n_classes} classes")
    tokens, noised = scene.crowd(size)
    result = compute.probes_of(scene.checkpoint, compute.rows(noised), compute.rows(tokens), scene.n_loops, scene.t,
                               latent)
    counts = f"{result.attrs['n_train_examples']} examples trained on, {result.attrs['n_test_examples']} tested"
    what = {"accuracy": "Accuracy on held-out examples", "selectivity": "Accuracy minus accuracy on the control task",
            "control_accuracy": "Accuracy on the control task, which only memorising solves"}[value]
    show.figure(probe_grid(result, value, region),
                f"{what}, a probe per {region} (down) and layer of every loop (across); {counts}. If each loop makes "
                f"one more {region} readable, the accuracies form a staircase.", name="probe-grid",
                title=f"*{latent}*, {region} by {region}", table=lambda: show.table_of(result))
    show.figure(probe_curves(result, value, region), "The same as curves"
                + (", with 95% intervals over held-out examples." if f"{value}_low" in result else "."),
                name="probe-curves", table=lambda: show.table_of(result))
    with st.expander("Definitions", icon=":material/menu_book:"):
        for name in ("accuracy", "control_accuracy", "selectivity", "majority"):
            st.markdown(f"**{result[name].attrs['long_name']}** — {result[name].attrs['definition']} "
                        f"({result[name].attrs['source']})")


main()
