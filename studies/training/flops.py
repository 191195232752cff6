"""Floating-point operations of a LoopMDM, counted from its configuration.

A multiply-add is two operations; norms, activations and softmax are left out (they are
below 2% at the widths trained here), which is what torch's FlopCounterMode counts too.
The backward pass is taken as twice the forward one.

    forward_flops(config, seq_len=96, n_loops=8)            # per example
    training_flops(config, seq_len=96, n_loops=4.5)         # per example, mean over S
"""

from __future__ import annotations

from hooks import LoopMDMConfig


def layer_flops(config: LoopMDMConfig, seq_len: int) -> float:
    """One layer on one example: projections, attention, MLP."""
    d = config.d_model
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.d_mlp
    attention = 2 * seq_len * d
    return 2 * seq_len * (4 * d * d + mlp + attention)


def forward_flops(config: LoopMDMConfig, *, seq_len: int, n_loops: float) -> float:
    """One forward on one example. ``n_loops`` may be a mean; conditioning counts once per layer call."""
    depth = config.n_head_layers + n_loops * config.n_loop_layers + config.n_tail_layers
    unembed = 2 * seq_len * config.d_model * config.vocab_size
    conditioning = 2 * config.d_cond * 6 * config.d_model * depth if config.conditioned else 0.0
    return depth * layer_flops(config, seq_len) + unembed + conditioning


def training_flops(config: LoopMDMConfig, *, seq_len: int, n_loops: float) -> float:
    """Forward and backward on one example: three forwards' worth."""
    return 3 * forward_flops(config, seq_len=seq_len, n_loops=n_loops)


def mean_loops(config: LoopMDMConfig) -> float:
    """E[S] of S ~ U{1..S_max}, (S_max + 1) / 2 (2605.26106)."""
    return (config.max_loops + 1) / 2
