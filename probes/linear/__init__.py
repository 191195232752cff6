"""Linear probes: which variables can be read off the residual stream, at which layer and loop.

    found = probe_latent(model, noised, labels, n_classes, n_loops=8, groups=groups)     # (depth, group)
    features, depths, topology = site_features(model, noised, n_loops=8)                 # [point, d_model] per depth
    probes = LogisticProbe(C=[0.01, 1.0]).fit_sites(features, labels.flatten())          # probes.probe(3): an estimator
"""

from probes.linear.description_length import online_code
from probes.linear.estimators import LogisticProbe, Probe, RegressionProbe, RidgeProbe, SiteProbes
from probes.linear.features import Features, site_features
from probes.linear.latents import probe_latent, probe_values
from probes.linear.loop_index import probe_loop
from probes.linear.transfer import transfer

__all__ = ["Features", "LogisticProbe", "Probe", "RegressionProbe", "RidgeProbe", "SiteProbes", "online_code",
           "probe_latent", "probe_loop", "probe_values", "site_features", "transfer"]
