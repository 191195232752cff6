"""The states of a run from loop to loop: what a study iterates over instead of writing the forward again.

    for k, (state, context) in enumerate(loop_states(model, noised, 8)):
        logits = model.coda(state, context)                   # what the model answers after k loops
"""

from __future__ import annotations

from collections.abc import Iterator

from hooks.contract import Context, Inputs, Levels, LoopedModel, State


def loop_states(model: LoopedModel, inputs: Inputs, n_loops: int | None = None, *,
                t: Levels = None) -> Iterator[tuple[State, Context]]:
    """The state [batch, pos, d_model] that enters the loops, then that after each of ``n_loops``, with the context.

    One run serves them all, and none is held. The context is that of the whole run: `LoopedModel.coda` of the state
    after k loops is the model's answer with k loops. Raises what `LoopedModel.enter` raises.
    """
    state, context = model.enter(inputs, n_loops, t=t)
    state = model.walk(state, context, 0, context.topology.n_head)
    yield state, context
    for depths in context.topology.loop_depths():
        state = model.walk(state, context, depths[0], depths[-1] + 1)
        yield state, context
