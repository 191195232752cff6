"""Lenses: what the model would answer from the residual stream, layer by layer and loop by loop.

    lens = read_lens(model, inputs, n_loops=8, kind="coda", targets=tokens)
"""

from probes.lenses.reading import LENSES, LensKind, read_lens

__all__ = ["LENSES", "LensKind", "read_lens"]
