"""From loop to loop: predictions written by hand, sums that must come out, the line, and the model really stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from hooks import Unavailable, adopt
from probes import over_examples, read_lens
from probes.lenses import after_loops, by_example, faithfulness, margin_by_loop, read_line, settled
from tests.small import MASK, small_model, small_tokens
from tests.specimens import SPECIMENS

LOOPS = 4


@pytest.fixture(scope="module")
def read():
    model, noised = small_model(seed=6, n_loop_layers=2), small_tokens(3)
    clean = torch.randint(0, MASK, noised.shape, generator=torch.Generator().manual_seed(1))
    return model, noised, clean, read_lens(model, noised, n_loops=LOOPS, kind="coda", targets=clean)


def written(predictions, targets):
    """A reading over loops of one example: [loop][pos] predictions, [pos] targets."""
    predictions = np.array(predictions)[:, None]
    rank = (predictions != np.array(targets)).astype(float)
    dims = ("loop", "batch", "pos")
    return xr.Dataset({"prediction": (dims, predictions), "target_rank": (dims, rank), "nll": (dims, rank)},
                      coords={"loop": range(len(predictions)),
                              "scored": (("batch", "pos"), np.ones((1, predictions.shape[-1]), bool))})


def test_when_a_position_settles_by_hand():
    found = settled(written([[1, 1, 5, 3, 3], [1, 2, 5, 3, 4], [1, 1, 5, 4, 4], [1, 1, 5, 3, 4]], [1, 1, 7, 4, 4]))
    assert found.loop_settled.values.tolist() == [[0, 2, 0, 3, 1]]
    assert found.flips.values.tolist() == [[0, 2, 0, 2, 1]]
    assert found.last_change.values.tolist() == [[-1, 2, -1, 3, 1]]
    assert found.lost.values.tolist() == [[0, 0, 0, 1, 0]]
    assert found.found.values.tolist() == [[0, 0, 0, 0, 1]]


def test_an_unscored_target_has_no_found_and_lost():
    lens = written([[1, 2], [1, 2]], [1, 1])
    lens["nll"][:, 0, 1] = np.nan
    assert np.isnan(settled(lens).found.values[0, 1])
    assert "found" not in settled(lens.drop_vars(["target_rank", "nll"]))


def test_after_each_loop_is_the_loops_last_layer(read):
    model, noised, clean, lens = read
    found = after_loops(lens)
    assert found.nll.dims == ("loop", "batch", "pos")
    for k in range(LOOPS):
        log_p = model(noised, k + 1).log_softmax(-1)
        np.testing.assert_allclose(found.nll.sel(loop=k), -log_p.gather(-1, clean[..., None])[..., 0].detach(),
                                   atol=2e-5)


def test_margins_of_loops_add_up_to_that_of_the_answer(read):
    model, noised, clean, lens = read
    logits = model(noised, LOOPS)
    target = logits.gather(-1, clean[..., None])[..., 0]
    others = logits.scatter(-1, clean[..., None], -torch.inf).amax(-1)
    np.testing.assert_allclose(margin_by_loop(lens).sum("loop"), (target - others).detach(), atol=1e-4)
    np.testing.assert_array_equal(lens.margin.isel(depth=-1) > 0, logits.argmax(-1) == clean)


def test_the_rank_counts_more_probable_tokens(read):
    model, noised, clean, lens = read
    logits = model(noised, LOOPS).detach().numpy()
    order = np.argsort(-logits, -1)
    np.testing.assert_array_equal(lens.target_rank.isel(depth=-1), (order == clean.numpy()[..., None]).argmax(-1))


def test_the_line_is_the_run_at_its_first_two_loops_and_by_hand_later(read):
    model, noised, clean, lens = read
    line = read_line(model, noised, n_loops=LOOPS, kind="coda", targets=clean)
    np.testing.assert_allclose(line.nll[:2], after_loops(lens).nll[:2], atol=2e-5)
    states, _, context = model.run(noised, LOOPS)
    at = states[3] + 3 * (states[5] - states[3])
    np.testing.assert_allclose(line.probability.sel(loop=3), model.coda(at, context).softmax(-1).amax(-1).detach(),
                               atol=2e-5)
    assert float(abs(line.nll - after_loops(lens).nll)[2:].max()) > 0.01


class Step(nn.Module):
    """Each loop adds the same vector: the run is a straight line."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.b, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.b.weight.data = torch.eye(4)

    def forward(self, tokens, n_loops=LOOPS):
        x = self.embed(tokens)
        for _ in range(n_loops):
            x = self.b(x)
        return self.out(x)


def test_a_run_along_a_line_does_not_beat_its_null():
    model, tokens = adopt(Step(), layers=["b"], n_loops=LOOPS, readout="out"), torch.arange(8).view(2, 4)
    lens, line = (of(model, tokens, n_loops=LOOPS, targets=tokens % 5) for of in (read_lens, read_line))
    np.testing.assert_allclose(after_loops(lens).nll, line.nll, atol=1e-5)


@pytest.mark.parametrize("kind", ["logit", "coda"])
def test_faithfulness_is_against_the_model_really_stopped(read, kind):
    model, noised, *_ = read
    found, lens = faithfulness(model, noised, n_loops=LOOPS, kind=kind), after_loops(
        read_lens(model, noised, n_loops=LOOPS, kind=kind))
    if kind == "coda":
        np.testing.assert_allclose(found.kl, 0, atol=1e-5)
        assert (found.agrees == 1).all()
        return
    states, _, context = model.run(noised, LOOPS)
    for k, depth in enumerate((2, 4, 6, 8)):
        log_q, log_p = model(noised, k + 1).log_softmax(-1), model.read(states[depth + 1], context).log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).nan_to_num(0).sum(-1)
        np.testing.assert_allclose(found.kl.sel(loop=k), kl.detach(), atol=2e-5)
        np.testing.assert_array_equal(found.agrees.sel(loop=k), lens.prediction.sel(loop=k) == log_q.argmax(-1).numpy())


def test_means_over_scored_positions_have_intervals(read):
    *_, lens = read
    means = by_example(after_loops(lens).nll)
    scored = lens.scored.values
    for example in range(3):
        expected = after_loops(lens).nll.values[:, example, scored[example]].mean(1)
        np.testing.assert_allclose(means.sel(example=example) if "example" in means.coords else means[:, example],
                                   expected, rtol=1e-5)
    found = over_examples(means)
    assert found.value.dims == ("loop",)
    assert (found.low <= found.value).all()
    where = torch.zeros(scored.shape, dtype=torch.bool)
    where[0, 3] = True
    chosen = by_example(lens.nll, where)
    np.testing.assert_allclose(chosen[:, 0], lens.nll[:, 0, 3], rtol=1e-6)
    assert chosen[:, 1:].isnull().all()


def test_what_is_not_defined_is_refused(read):
    model, noised, _, lens = read
    with pytest.raises(ValueError, match="a margin is that of a target"):
        margin_by_loop(read_lens(model, noised, n_loops=LOOPS))
    with pytest.raises(ValueError, match="after two loops"):
        read_line(model, noised, n_loops=1)
    with pytest.raises(ValueError, match="nothing is looped"):
        after_loops(lens.isel(depth=[0]))


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_looped_model_has_its_readouts(name):
    specimen = SPECIMENS[name]()
    if name == "bridge":
        with pytest.raises(ValueError, match="after two loops"):
            read_line(specimen.model, specimen.inputs, n_loops=specimen.n_loops, targets=specimen.targets)
        return
    read = read_lens(specimen.model, specimen.inputs, n_loops=specimen.n_loops, targets=specimen.targets)
    line = read_line(specimen.model, specimen.inputs, n_loops=specimen.n_loops, targets=specimen.targets)
    assert settled(read).flips.shape == read.scored.shape
    np.testing.assert_allclose(after_loops(read).nll[:2].where(read.scored), line.nll[:2].where(read.scored), atol=1e-4)
    if name in ("positions-first", "without-positions"):
        with pytest.raises(Unavailable, match="what would make it run 1 is not known"):
            faithfulness(specimen.model, specimen.inputs, n_loops=specimen.n_loops)
        return
    found = faithfulness(specimen.model, specimen.inputs, n_loops=specimen.n_loops, kind="coda")
    np.testing.assert_allclose(found.kl.isel(loop=-1).where(found.scored, 0), 0, atol=1e-5)
