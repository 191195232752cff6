"""probes: what a recording shows, as labelled arrays that carry units, definition and source.

    from probes import attention_summary, dynamics, probe_latent, read_lens

    lens = read_lens(model, noised, n_loops=8, kind="coda", targets=tokens)   # xarray.Dataset (depth, batch, pos)
"""

from probes.attention import attention_summary, pattern_distance, patterns
from probes.causal import causal_scan
from probes.dimension import intrinsic_dimension
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
from probes.heads import attention_over_steps, head_kinds
from probes.intervals import over_examples
from probes.lenses import JacobianLens, RecalibratedLens, TunedLens, load_lens, read_lens, read_line
from probes.linear import (
    LogisticProbe,
    RegressionProbe,
    RidgeProbe,
    online_code,
    probe_latent,
    probe_loop,
    probe_values,
    site_features,
    transfer,
)
from probes.loop_map import jacobian_spectrum, lyapunov
from probes.measurement import depth_coords, measurement
from probes.paths import head_scan, path_effects
from probes.periods import periods
from probes.perturbed import basins, line_search
from probes.responses import responses
from probes.similarity import between_depths, cka_between_depths, linear_cka
from probes.stage_test import Verdict, stage_test

__all__ = ["JacobianLens", "LogisticProbe", "RecalibratedLens", "RegressionProbe", "RidgeProbe", "TunedLens",
           "Verdict", "attention_over_steps", "attention_summary", "basins", "between_depths", "causal_scan",
           "cka_between_depths", "classify_tokens", "contraction", "depth_coords", "dynamics", "effective_rank",
           "exchange", "fixed_point", "gains", "head_kinds", "head_scan", "intrinsic_dimension", "jacobian_spectrum",
           "line_search", "linear_cka", "load_lens", "lyapunov", "matrix_entropy", "measurement", "online_code",
           "over_examples", "path_effects", "pattern_distance", "patterns", "periods", "probe_latent", "probe_loop",
           "probe_values", "read_lens", "read_line", "responses", "site_features", "stage_test", "tau",
           "trajectory_pca", "transfer"]
