"""Linear probes: which variables can be read off the residual stream, at which layer and loop."""

from probes.linear.latents import probe_latent, ridge_probes

__all__ = ["probe_latent", "ridge_probes"]
