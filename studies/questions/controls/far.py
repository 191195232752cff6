"""Far loops: loops so late that a trained model has nothing left to do.

    far = far_loops(model)
    stage_test(model, noised, targets=tokens, n_loops=far[1], loop_ranges=[far])
"""

from __future__ import annotations

from hooks import LoopedModel


def far_loops(model: LoopedModel, n: int = 4) -> tuple[int, int]:
    """(first, after the last) of ``n`` loops from twice the model's own number of loops on."""
    return 2 * model.max_loops, 2 * model.max_loops + n
