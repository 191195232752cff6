"""Denoise: the sampler step by step, with the loops that each step took."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app import compute, selection, show
from app.figures.denoise import confidence_grid, loop_changes, step_costs
from app.figures.grids import Look, Panel, token_grids
from app.selection import Scene

ORDERS = {"confident first": "confidence", "at random": "ancestral"}


def main() -> None:
    scene = selection.choose()
    st.title("Denoise: unmasking, step by step", anchor=False)
    st.markdown("The sampler starts from the masked example and reveals some positions at each step. Every step runs "
                "the loops anew, so **steps and loops are two ways to spend compute**.")
    if not scene.hidden.any():
        st.info("Nothing is masked, so there is nothing to reveal: raise the noise level or draw a mask.",
                icon=":material/grid_off:")
        return
    config, seed = _config(scene)
    trace = compute.trace_of(scene.checkpoint, compute.rows(scene.noised), config, seed)
    if st.session_state.get("step", 0) >= len(trace):   # it was chosen when there were more
        st.session_state["step"] = len(trace) - 1
    step = st.slider("Step", 0, len(trace) - 1, key="step", bind="query-params") if len(trace) > 1 else 0
    _numbers(scene, trace)
    _step(scene, trace, step)
    left, right = st.columns(2, gap="large")
    with left:
        show.figure(step_costs(trace, _progress(scene, trace), current=step, max_loops=scene.n_loops),
                    "Above, loops used at each step; below, the shares of free positions that are revealed, and right, "
                    "after it. "
                    "The shaded step is the one shown above.", name="step-costs", title="Cost and progress",
                    table=lambda: _table(scene, trace))
    with right:
        show.figure(confidence_grid(trace, scene.task.regions().numpy(), scene.task.region_name,
                                    scene.task.position_names(), n_tokens=scene.task.mask_token_id, current=step),
                    "Probability of the token drawn at every still masked position; white once revealed, a dot where "
                    "it was.",
                    name="confidence", title="Confidence", table=lambda: _table(scene, trace))
    if scene.n_loops > 1:
        show.figure(loop_changes(trace, current=step),
                    "How far each loop moved the state, relative to its size, on average over positions that were "
                    "still masked. Rows are loops, counted from 0; the first has none before it to compare with.",
                    name="loop-changes", title="What each loop changes", table=lambda: _changes(trace))


def _config(scene: Scene) -> tuple[dict[str, Any], int]:
    """Fields of SamplerConfig, and the seed."""
    columns = st.columns([1.5, 2.1, 1.2, 1.2, 1.7], gap="medium")
    n_steps = columns[0].slider("Denoising steps", 1, 32, 8, key="steps", bind="query-params")
    order = ORDERS[columns[1].segmented_control("Reveal", list(ORDERS), default="confident first", required=True,
                                                key="order", bind="query-params")]
    temperature = columns[2].slider("Temperature", 0.0, 1.5, 1.0, 0.1, key="temperature", bind="query-params",
                                    help="0 takes the most probable token at every position.")
    seed = int(columns[3].number_input("Sampling seed", 0, 999, 0, key="seed", bind="query-params"))
    threshold = None
    if columns[4].toggle("adaptive loops", key="adaptive", bind="query-params", help="Stop looping once a loop changes "
                         "the state by less than the threshold, relative to its size; at most S loops."):
        threshold = columns[4].slider("Stop below a relative change of", 0.01, 0.5, 0.1, 0.01, key="threshold",
                                      bind="query-params")
    return {"n_steps": n_steps, "order": order, "n_loops": scene.n_loops, "exit_threshold": threshold,
            "temperature": temperature}, seed


def _numbers(scene: Scene, trace: list[dict[str, np.ndarray]]) -> None:
    final, truth, hidden = trace[-1]["after"][0], scene.tokens.numpy(), scene.hidden.numpy()
    loops = sum(int(step["loops_used"][0]) for step in trace)
    columns = st.columns(4)
    columns[0].metric("masked positions right at the end", f"{(final == truth)[hidden].mean():.1%}")
    columns[1].metric("whole example", "exact" if (final == truth).all() else f"{(final != truth).sum()} wrong")
    columns[2].metric("loops in all", loops)
    columns[3].metric("loops per step", f"{loops / len(trace):.1f}", help=f"at most {scene.n_loops}")


def _step(scene: Scene, trace: list[dict[str, np.ndarray]], step: int) -> None:
    here, truth = trace[step], scene.tokens.numpy()
    look = Look.of(scene.task)
    masked = here["before"][0] == look.mask
    drawn = np.where(masked, here["predicted"][0], here["before"][0])
    after = here["after"][0]
    revealed, loops = int(here["revealed"].sum()), int(here["loops_used"][0])
    panels = [Panel("the model sees", here["before"][0], wrong=~masked & (here["before"][0] != truth)),
              Panel("it draws", drawn, wrong=drawn != truth, marked=here["revealed"][0]),
              Panel("after the step", after, wrong=(after != look.mask) & (after != truth), marked=here["revealed"][0]),
              Panel("truth", truth)]
    show.figure(token_grids(panels, look, columns=4, cell=22, width=960),
                f"Step {step} of {len(trace)}, noise level t = {float(here['t']):.2f}: "
                f"{revealed} position{'s' * (revealed != 1)} revealed with {loops} loop{'s' * (loops != 1)}. Cells "
                "with a red corner are errors, rings mark what this step reveals.",
                name="step", title=f"Step {step}", table=lambda: _table(scene, trace))


def _progress(scene: Scene, trace: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    free, truth = scene.free.numpy(), scene.tokens.numpy()
    after = np.stack([step["after"][0] for step in trace])[:, free]
    return {"revealed": (after != scene.task.mask_token_id).mean(1), "right": (after == truth[free]).mean(1)}


def _changes(trace: list[dict[str, np.ndarray]]) -> pd.DataFrame:
    """One row per step and loop."""
    return pd.concat([pd.DataFrame({"step": int(step["step"]), "loop": np.arange(len(step["change"])),
                                    "relative_change": step["change"]}) for step in trace])


def _table(scene: Scene, trace: list[dict[str, np.ndarray]]) -> pd.DataFrame:
    """One row per step and position."""
    return pd.concat([pd.DataFrame({
        "step": int(step["step"]), "t": float(step["t"]), "loops_used": int(step["loops_used"][0]),
        "position": scene.task.position_names(), "before": step["before"][0], "drawn": step["predicted"][0],
        "probability": step["probability"][0], "after": step["after"][0], "truth": scene.tokens.numpy()})
        for step in trace])


main()
