"""Lenses: what the model would answer from the residual stream, layer by layer and loop by loop.

    lens = read_lens(model, inputs, n_loops=8, kind="coda", targets=tokens)
    tuned = TunedLens.fit(model, inputs, n_loops=8)                               # then kind=tuned
"""

from probes.lenses.base import CodaLens, Lens, LogitLens
from probes.lenses.fitted import FittedLens, load_lens
from probes.lenses.jacobian import JacobianLens
from probes.lenses.reading import LENSES, LensKind, read_lens, read_line
from probes.lenses.readouts import after_loops, by_example, faithfulness, margin_by_loop, settled
from probes.lenses.recalibrated import RecalibratedLens
from probes.lenses.tuned import TunedLens

__all__ = ["LENSES", "CodaLens", "FittedLens", "JacobianLens", "Lens", "LensKind", "LogitLens", "RecalibratedLens",
           "TunedLens", "after_loops", "by_example", "faithfulness", "load_lens", "margin_by_loop", "read_lens",
           "read_line", "settled"]
