"""A forward by hand whose states can be differentiated: for attribution, Jacobians and their spectra.

    states, context = differentiable_states(model, noised, n_loops=4)
    torch.autograd.grad(model.read(states[-1], context).sum(), states[0])
"""

from __future__ import annotations

import torch
from torch import Tensor

from hooks.contract import Context, Inputs, Levels, LoopedModel, Unavailable
from probes.measurement import check_finite


def differentiable_states(model: LoopedModel, inputs: Inputs, n_loops: int | None = None, *,
                          t: Levels = None) -> tuple[list[Tensor], Context]:
    """The state before the first layer and after each one, [batch, pos, d_model], each a function of those before it.

    The first is a leaf. Parameters get no gradients if `torch.autograd.grad` is asked for those of states alone.
    Raises `hooks.Unavailable` where the model's own code runs layers without gradients, and ValueError for states
    that are not finite.
    """
    with torch.enable_grad():
        with torch.no_grad():
            state, context = model.enter(inputs, n_loops, t=t)
        states = [state.detach().clone().requires_grad_()]
        for depth in range(context.topology.depth):
            states.append(model.apply(depth, states[-1], context))
            check_finite(states[-1], "the residual stream")
            if not states[-1].requires_grad:
                raise Unavailable(f"{model.name} runs the layer at depth {depth} without gradients, under "
                                  "torch.no_grad() in its own code: nothing can be differentiated there. What needs no "
                                  "gradients is not affected: patching, the logit, coda and tuned lens.")
    return states, context
