"""A counter: a loop that is told very loudly which loop it is.

A large random vector per loop is added to the state, so that the shared block sees little else. Whatever the loops of
such a model do, they do not repeat one operation on their content.

    made = counter(loop_model, scale=30.0, seed=0)
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hooks import HookedLoopMDM
from studies.questions.controls.retraining import Batches, retrained


@torch.no_grad()
def counter(model: HookedLoopMDM, n_loops: int | None = None, *, scale: float = 30.0, seed: int = 0,
            batches: Batches | None = None, steps: int = 200) -> HookedLoopMDM:
    """A copy of ``model`` with a random vector of standard deviation ``scale`` (units of the residual stream, whose
    token embeddings have 1) for each of ``n_loops`` loops. With ``batches`` it is trained for ``steps`` steps; the
    vectors are trained too."""
    n_loops = model.topology(n_loops).n_loops
    made = HookedLoopMDM(replace(model.config, loop_embedding="learned", max_loops=n_loops)).eval()
    state = {name: value for name, value in model.state_dict().items() if name != "loop_embed.weight"}
    missing = made.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["loop_embed.weight"]
    made.loop_embed.weight.normal_(std=scale, generator=torch.Generator().manual_seed(seed))
    if batches is not None:
        with torch.enable_grad():
            retrained(made, batches, steps=steps, n_loops=n_loops, seed=seed)
    return made
