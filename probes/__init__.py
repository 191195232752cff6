"""probes: what a recording shows, as labelled arrays that carry units, definition and source.

    from probes import attention_summary, dynamics, probe_latent, read_lens

    lens = read_lens(model, noised, n_loops=8, kind="coda", targets=tokens)   # xarray.Dataset (depth, batch, pos)
"""

from probes.attention import attention_summary, pattern_distance, patterns
from probes.geometry import (
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    matrix_entropy,
    trajectory_pca,
)
from probes.lenses import read_lens
from probes.linear import probe_latent, ridge_probes
from probes.measurement import depth_coords, measurement
from probes.similarity import cka_between_depths, linear_cka

__all__ = ["attention_summary", "cka_between_depths", "classify_tokens", "contraction", "depth_coords", "dynamics",
           "effective_rank", "fixed_point", "linear_cka", "matrix_entropy", "measurement", "pattern_distance",
           "patterns", "probe_latent", "read_lens", "ridge_probes", "trajectory_pca"]
