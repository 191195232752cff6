"""probes: what a recording shows, as labelled arrays that carry units, definition and source.

    from probes import attention_summary, dynamics, probe_latent, read_lens

    lens = read_lens(model, noised, n_loops=8, kind="coda", targets=tokens)   # xarray.Dataset (depth, batch, pos)
"""

from probes.attention import attention_summary, pattern_distance, patterns
from probes.causal import causal_scan
from probes.exchange import exchange, tau
from probes.gains import gains
from probes.geometry import (
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    matrix_entropy,
    trajectory_pca,
)
from probes.intervals import over_examples
from probes.lenses import read_lens
from probes.linear import probe_latent
from probes.measurement import depth_coords, measurement
from probes.responses import responses
from probes.similarity import cka_between_depths, linear_cka
from probes.stage_test import Verdict, stage_test

__all__ = ["Verdict", "attention_summary", "causal_scan", "cka_between_depths", "classify_tokens", "contraction",
           "depth_coords", "dynamics", "effective_rank", "exchange", "fixed_point", "gains", "linear_cka",
           "matrix_entropy", "measurement", "over_examples", "pattern_distance", "patterns", "probe_latent",
           "read_lens", "responses", "stage_test", "tau", "trajectory_pca"]
