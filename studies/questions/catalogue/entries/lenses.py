"""Lenses of the catalogue: what a state between the layers says the answer is."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hooks import Topology
from probes import JacobianLens, RecalibratedLens, TunedLens, read_lens, read_line
from probes.lenses.fitted import FittedLens
from probes.lenses.reading import LensKind
from probes.lenses.readouts import after_loops, faithfulness, margin_by_loop, settled
from probes.lenses.readouts import by_example as scored_means
from studies.questions.catalogue.entries.entry import CatalogueEntry, example_mean, quantities
from studies.questions.catalogue.entries.setting import Setting

FEW = 16
"""Examples that the Jacobian lens is fitted on: it takes one backward pass per width and example."""
EPOCHS = 40

LINE = "the straight line through the states after loops 0 and 1, read by the same lens"
UNFITTED = "the lens before it was fitted, on the same held-out examples"


def _read(setting: Setting, kind: LensKind) -> xr.Dataset:
    return read_lens(setting.model, setting.inputs, n_loops=setting.n_loops, kind=kind, targets=setting.targets,
                     t=setting.t)


def _line(setting: Setting, kind: LensKind) -> xr.Dataset:
    return read_line(setting.model, setting.inputs, n_loops=setting.n_loops, kind=kind, targets=setting.targets,
                     t=setting.t)


def _over_depth(setting: Setting, kind: LensKind, name: str) -> xr.Dataset:
    found = example_mean(scored_means(_read(setting, kind)[name], setting.scored))
    if setting.run.context.topology.n_loops > 1:
        found["null"] = _at_loop_ends(scored_means(_line(setting, kind)[name], setting.scored).mean("example"),
                                      found.value, setting.run.context.topology)
    return found


def _at_loop_ends(of_loops: xr.DataArray, like: xr.DataArray, topology: Topology) -> xr.DataArray:
    """Values of loops at the depths where the loops end, NaN elsewhere."""
    placed = like.copy(data=np.full(like.shape, np.nan))
    placed.values[[depths[-1] for depths in topology.loop_depths()]] = of_loops.values
    return placed


def _fitted(lens: FittedLens, name: str) -> xr.Dataset:
    return example_mean(lens.held_out[name], null=lens.held_out[f"{name}_before"])


def _logit(setting: Setting) -> xr.Dataset:
    return _over_depth(setting, "logit", "kl_to_final")


def _coda(setting: Setting) -> xr.Dataset:
    return _over_depth(setting, "coda", "nll")


def _rank(setting: Setting) -> xr.Dataset:
    return _over_depth(setting, "logit", "target_rank")


def _tuned(setting: Setting) -> xr.Dataset:
    return _fitted(TunedLens.fit(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t,
                                 scored=setting.scored, seed=setting.seed, max_epochs=EPOCHS, progress=False), "kl")


def _jacobian(setting: Setting) -> xr.Dataset:
    few = setting.first(FEW)
    return _fitted(JacobianLens.fit(few.model, few.inputs, n_loops=few.n_loops, t=few.t, scored=few.scored,
                                    seed=few.seed, progress=False), "kl")


def _recalibrated(setting: Setting) -> xr.Dataset:
    return _fitted(RecalibratedLens.fit(setting.model, setting.inputs, setting.targets, n_loops=setting.n_loops,
                                        t=setting.t, scored=setting.scored, seed=setting.seed), "nll")


def _settled(setting: Setting) -> xr.Dataset:
    def shares(lens: xr.Dataset) -> xr.DataArray:
        when = settled(lens).loop_settled
        loops = np.arange(after_loops(lens).sizes["loop"])
        by_loop = (when <= xr.DataArray(loops, dims="loop", coords={"loop": loops})).astype(float)
        found = scored_means(by_loop.assign_coords(scored=lens.scored), setting.scored)
        return found.assign_attrs(when.attrs, long_name="share of positions whose prediction has settled", units="1")

    return example_mean(shares(_read(setting, "coda")), null=shares(_line(setting, "coda")))


def _changes(setting: Setting) -> xr.Dataset:
    when = settled(_read(setting, "coda"))
    parts = {"wrong after loop 0, right at the end": when.found, "right after some loop, wrong at the end": when.lost}
    return example_mean(quantities({name: scored_means(part.astype(float), setting.scored)
                                  for name, part in parts.items()}).assign_attrs(long_name="share of positions",
                                                                                 units="1"))


def _margin(setting: Setting) -> xr.Dataset:
    own, line = (margin_by_loop(read) for read in (_read(setting, "coda"), _line(setting, "coda")))
    return example_mean(scored_means(own, setting.scored), null=scored_means(line, setting.scored))


def _faithful(setting: Setting) -> xr.Dataset:
    kinds: tuple[LensKind, ...] = ("logit", "coda")
    of_kinds = {kind: faithfulness(setting.model, setting.inputs, n_loops=setting.n_loops, kind=kind, t=setting.t).kl
                for kind in kinds}
    return example_mean(quantities({f"{kind} lens": scored_means(kl, setting.scored)
                                    for kind, kl in of_kinds.items()}))


def _entropy(setting: Setting) -> xr.Dataset:
    return _over_depth(setting, "logit", "entropy")



LENSES = (
    CatalogueEntry("logit_lens", "Logit lens", "Lenses", "KL(p_final ‖ p), p = softmax(unembed(ln_final(X)))",
        "0 and above, nat", "How far what a state says, read as if it were the last one, is from the answer.",
        "A model need not keep its states in the basis that it reads at the end: a high KL can be a matter of"
        " basis (compare with the tuned lens). A state that moves along a straight line comes nearer, too.",
        "nostalgebraist 2020", _logit, LINE),
    CatalogueEntry("coda_lens", "Coda lens", "Lenses", "−log p(target), p = softmax(tail(X))", "0 and above, nat",
        "The NLL of the right answer, if looping stopped here and the tail went on.",
        "The tail was trained on states after a random number of loops: before the first loop it meets states"
        " that it never saw.", "2507.02199", _coda, LINE),
    CatalogueEntry("target_rank", "Rank of the target", "Lenses",
        "number of tokens more probable than the target under the logit lens, ties half", "0 to vocabulary − 1",
        "Where in the list of guesses the right answer stands.", "A mean of ranks is decided by few bad positions.",
        "nostalgebraist 2020", _rank, LINE),
    CatalogueEntry("entropy", "Entropy of the lens", "Lenses", "−Σ p log p, p of the logit lens",
        "0 to log(vocabulary), nat", "How sure the state is of what it says.",
        "Sure is not right, and a larger norm alone makes a lens surer.", "nostalgebraist 2020", _entropy, LINE),
    CatalogueEntry("tuned_lens", "Tuned lens", "Lenses",
        "KL(p_final ‖ p), p = softmax(unembed(ln_final(X + A X + b))), A and b of each (loop, layer)",
        "0 and above, nat", "What can be read of the answer after an affine change of basis.",
        "It is fitted to predict the answer, and finds what is correlated with it, used or not. Values are of"
        " examples that it was not fitted on.", "2303.08112", _tuned, UNFITTED),
    CatalogueEntry("jacobian_lens", "Jacobian lens", "Lenses",
        "KL(p_final ‖ p), p = softmax(unembed(ln_final(J X))), J = mean of ∂X_final ÷ ∂X", "0 and above, nat",
        "What a state says by the effect that its directions have on the last state.",
        "First order, and a mean over positions: far from the end the effect differs from position to position.",
        "Gurnee et al. 2026; 2609.01924", _jacobian, UNFITTED),
    CatalogueEntry("recalibrated_lens", "Recalibrated lens", "Lenses",
        "−log softmax(a · lens(X))(target), a of the depth", "0 and above, nat",
        "The coda lens with its temperature set on other examples: what part of a bad NLL is mere over- or "
        "underconfidence.", "One number per depth: it cannot mend confidence that differs by position.", "2609.19934",
        _recalibrated, UNFITTED),
    CatalogueEntry("settled", "Settling", "Lenses",
        "share of scored positions whose prediction from loop k on is the last loop's", "0 to 1",
        "In which loop positions are decided, for good.",
        "The last loop has always settled, and a model that always answers the same from the start on: "
        "untrained ones too. Of a model that stops early it says nothing about whether it would have changed "
        "its mind.", "2604.07822", _settled, LINE, loops=2),
    CatalogueEntry("found_and_lost", "Found and lost", "Lenses",
        "shares of positions: wrong after loop 0 and right at the end; right after some loop and wrong at the end",
        "0 to 1", "What later loops mend, and what they spoil (overthinking).",
        "Read by the coda lens, which before the last loop is the model stopped there.", "2604.07822", _changes,
        loops=2),
    CatalogueEntry("margin", "Margin by loop", "Lenses",
        "m_k − m_(k−1), m = logit of the target − largest other logit, coda lens", "any, nat",
        "How much each loop adds to the lead of the right answer; the sum is the lead at the end.",
        "Logits grow with the norm, whether or not anything is decided.", "2609.21383", _margin, LINE, loops=2),
    CatalogueEntry("faithfulness", "Faithfulness of lenses", "Lenses",
        "KL(model run with k + 1 loops ‖ lens after loop k)", "0 and above, nat",
        "Whether a lens says what the model would answer if it were stopped there.",
        "The coda lens is exact by construction wherever a loop does not know how many follow.", "ours", _faithful,
        loops=2),
)
