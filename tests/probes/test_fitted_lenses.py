"""Fitted lenses: closed forms of linear models, naive Jacobians, scipy's optimum, files, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from hooks import Unavailable, adopt
from probes import over_examples, read_lens
from probes.lenses import JacobianLens, RecalibratedLens, TunedLens, load_lens
from probes.lenses.recalibrated import RIDGE
from tests.small import MASK, small_model
from tests.specimens import SPECIMENS

LOOPS, WIDTH, VOCAB = 3, 6, 9


class Linear(nn.Module):
    """Each loop turns and stretches the state: x → M x. Every state is a linear map of the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.b = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.orthogonal_(self.b.weight)
        self.embed.weight.data *= 2

    def forward(self, tokens, n_loops=LOOPS):
        x = self.embed(tokens)
        for _ in range(n_loops):
            x = self.b(x)
        return self.out(x)


@pytest.fixture(scope="module")
def linear():
    module = Linear()
    model = adopt(module, layers=["b"], n_loops=LOOPS, readout="out")
    return model, torch.randint(0, 40, (60, 5), generator=torch.Generator().manual_seed(1)), module


@pytest.fixture(scope="module")
def masked():
    model = small_model(seed=3, loop_embedding="learned")
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(0, MASK, (40, 8), generator=generator)
    return model, torch.where(torch.rand(40, 8, generator=generator) < 0.5, MASK, clean), clean


def test_a_linear_models_jacobian_is_the_power_of_its_map(linear):
    model, tokens, module = linear
    lens = JacobianLens.fit(model, tokens, n_loops=LOOPS)
    for depth in range(LOOPS):
        power = torch.linalg.matrix_power(module.b.weight.detach(), LOOPS - 1 - depth)
        torch.testing.assert_close(lens.weights["J"][depth], power, atol=1e-5, rtol=0)
    assert float(lens.held_out.kl.max()) < 1e-5 < 0.1 < float(lens.held_out.kl_before.isel(depth=0).mean())


def test_a_tuned_lens_finds_the_map_of_a_linear_model(linear):
    model, tokens, module = linear
    lens = TunedLens.fit(model, tokens, n_loops=LOOPS, lr=0.02, max_epochs=200)
    before, after = lens.held_out.kl_before.mean("example"), lens.held_out.kl.mean("example")
    assert (after[:-1] < 0.01 * before[:-1]).all()
    assert (before[:-1] > 0.1).all()
    found = module.out.weight.detach() @ (torch.eye(WIDTH) + lens.weights["A"][0])   # logits are known up to a shift
    wanted = module.out.weight.detach() @ torch.linalg.matrix_power(module.b.weight.detach(), LOOPS - 1)
    difference = (found - found.mean(0)) - (wanted - wanted.mean(0))
    assert float(difference.norm() / wanted.norm()) < 0.1
    assert over_examples(lens.held_out.kl).high[0] < over_examples(lens.held_out.kl_before).low[0]


@pytest.mark.parametrize("towards", ["final", "exit"])
def test_the_jacobian_is_that_of_a_naive_loop(masked, towards):
    model, noised, _ = masked
    noised = noised[:10]
    scored = torch.zeros_like(noised, dtype=torch.bool)
    scored[:, 2] = True
    lens = JacobianLens.fit(model, noised, n_loops=LOOPS, towards=towards, scored=scored, seed=1, rows=3)
    judged = len(lens.held_out.example)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))[:10 - judged]
    states, _, context = model.run(noised, LOOPS)
    topology = context.topology
    exits = {0: 0, 1: 2, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6, 7: 7}
    for depth in range(topology.depth):
        end = topology.depth - 1 if towards == "final" else exits[depth]
        total = torch.zeros(16, 16)
        for example in order.tolist():
            row = context.rows(torch.tensor([example]))
            state = states[depth + 1][example:example + 1].detach()

            def at(x, state=state, row=row, depth=depth, end=end):
                moved = state.clone()
                moved[0, 2] = x
                return model.walk(moved, row, depth + 1, end + 1)[0, 2]

            total += torch.autograd.functional.jacobian(at, state[0, 2])
        torch.testing.assert_close(lens.weights["J"][depth], total / len(order), atol=2e-5, rtol=1e-4)
    carried = states[3] @ lens.weights["J"][2].T
    expected = model.read(carried, context) if towards == "final" else model.coda(carried, context)
    read = read_lens(model, noised, n_loops=LOOPS, kind=lens).isel(depth=2)
    np.testing.assert_allclose(read.probability, expected.softmax(-1).amax(-1).detach(), atol=1e-5)


def test_one_map_per_layer_or_one_per_layer_and_loop(masked):
    model, noised, _ = masked
    shared = TunedLens.fit(model, noised, n_loops=LOOPS, shared=True, max_epochs=2)
    own = TunedLens.fit(model, noised, n_loops=LOOPS, max_epochs=2)
    assert len(shared.weights["A"]) == 4
    assert len(own.weights["A"]) == 8
    states, _, context = model.run(noised, LOOPS)
    for lens, which in ((shared, 1), (own, 3)):                                   # layer 1 in loop 1 is depth 3
        moved = states[4] + states[4] @ lens.weights["A"][which].T + lens.weights["b"][which]
        read = read_lens(model, noised, n_loops=LOOPS, kind=lens).isel(depth=3)
        np.testing.assert_allclose(read.probability, model.read(moved, context).softmax(-1).amax(-1).detach(),
                                   atol=1e-5)


def test_a_tuned_lens_is_never_worse_than_the_logit_lens_where_it_stops_and_the_seed_decides_it(masked):
    model, noised, _ = masked
    lens, again = (TunedLens.fit(model, noised, n_loops=LOOPS, max_epochs=15, seed=5) for _ in range(2))
    torch.testing.assert_close(lens.weights, again.weights)
    assert float((lens.held_out.kl - lens.held_out.kl_before).mean()) < 0
    np.testing.assert_allclose(lens.held_out.kl.isel(depth=-1), 0, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    before = read_lens(model, noised, n_loops=LOOPS).kl_to_final.mean(("batch", "pos"))
    after = read_lens(model, noised, n_loops=LOOPS, kind=lens).kl_to_final.mean(("batch", "pos"))
    assert (after[:-1] < before[:-1]).all()


@pytest.mark.parametrize("mode", ["temperature", "affine"])
def test_recalibration_is_scipys_optimum(masked, mode):
    model, noised, clean = masked
    lens = RecalibratedLens.fit(model, noised, clean, n_loops=LOOPS, base="coda", mode=mode, seed=2)
    judged = len(lens.held_out.example)
    scored = model.scored(noised)
    some = torch.nonzero(scored.any(1))[:, 0]
    fitted = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(2))][:len(some) - judged]
    states, _, context = model.run(noised, LOOPS)
    for depth in (0, 4, 7):
        answer = model.coda(states[depth + 1], context) if depth < 7 else model.read(states[8], context)
        z = answer.detach()[fitted][scored[fitted]].double()
        z = (z - z.amax(-1, keepdim=True)).clamp_min(-1e4).numpy()
        truth = clean[fitted][scored[fitted]].numpy()

        def loss(free, z=z, truth=truth):
            b = np.concatenate([free[1:], np.zeros(z.shape[1] + 1 - len(free))])
            made = np.exp(free[0]) * z + b
            return (np.mean(scipy.special.logsumexp(made, 1) - made[np.arange(len(z)), truth])
                    + RIDGE / 2 * (free ** 2).sum())

        best = scipy.optimize.minimize(loss, np.zeros(1 + (z.shape[1] if mode == "affine" else 0)), tol=1e-10)
        np.testing.assert_allclose(float(lens.weights["a"][depth]), np.exp(best.x[0]), rtol=5e-3)
        if mode == "affine":
            np.testing.assert_allclose(lens.weights["b"][depth], best.x[1:], atol=2e-2)
    assert set(lens.held_out) == {"nll", "nll_before"}


def test_targets_drawn_from_overconfident_answers_give_back_the_temperature(linear):
    model, _, _ = linear
    tokens = torch.randint(0, 40, (800, 5), generator=torch.Generator().manual_seed(7))
    logits = model(tokens, LOOPS)
    torch.manual_seed(0)
    drawn = torch.distributions.Categorical(logits=logits / 2.5).sample()
    many = RecalibratedLens.fit(model, tokens, drawn, n_loops=LOOPS, base="logit",
                                scored=torch.ones_like(tokens, dtype=torch.bool))
    assert 1 / float(many.weights["a"][-1]) == pytest.approx(2.5, rel=0.1)
    assert float(many.held_out.nll.isel(depth=-1).mean()) < float(many.held_out.nll_before.isel(depth=-1).mean())


@pytest.mark.parametrize("made", ["tuned", "jacobian", "recalibrated"])
def test_a_lens_is_saved_and_belongs_to_its_model(masked, made, tmp_path):
    model, noised, clean = masked
    lens = {"tuned": lambda: TunedLens.fit(model, noised, n_loops=LOOPS, max_epochs=2),
            "jacobian": lambda: JacobianLens.fit(model, noised, n_loops=LOOPS, towards="exit"),
            "recalibrated": lambda: RecalibratedLens.fit(model, noised, clean, n_loops=LOOPS, mode="affine")}[made]()
    path = lens.save(tmp_path / "new" / "lens.safetensors")
    back = load_lens(path)
    assert type(back) is type(lens)
    assert back.options == lens.options
    first, second = (read_lens(model, noised, n_loops=LOOPS, kind=one, targets=clean) for one in (lens, back))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    for name in lens.held_out:
        np.testing.assert_array_equal(lens.held_out[name], back.held_out[name])
    assert type(lens).load(path).options == lens.options
    with pytest.raises(ValueError, match="fitted for other weights"):
        read_lens(small_model(seed=9, loop_embedding="learned"), noised, n_loops=LOOPS, kind=back)
    with pytest.raises(ValueError, match=r"loops of \(1, 2, 1, 3\), the run has \(1, 2, 1, 2\)"):
        read_lens(model, noised, n_loops=2, kind=back)
    other = TunedLens if made != "tuned" else JacobianLens
    with pytest.raises(ValueError, match=f"holds a {made} lens"):
        other.load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        load_lens(path)


def test_what_is_no_lens_is_refused(tmp_path, masked):
    model, noised, clean = masked
    with pytest.raises(FileNotFoundError, match="there is no lens"):
        load_lens(tmp_path / "none.safetensors")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no lens that this version knows"):
        load_lens(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="takes at least 7: give more"):
        TunedLens.fit(model, noised[:4], n_loops=LOOPS)
    with pytest.raises(ValueError, match="scored has shape"):
        TunedLens.fit(model, noised, n_loops=LOOPS, scored=torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="give clean tokens"):
        RecalibratedLens.fit(model, noised, n_loops=LOOPS)
    with pytest.raises(ValueError, match="targets have shape"):
        RecalibratedLens.fit(model, noised, clean[:, :4], n_loops=LOOPS)


@pytest.mark.unchecked
def test_unknown_options_are_refused(masked):
    model, noised, clean = masked
    with pytest.raises(ValueError, match="towards must be one of final, exit"):
        JacobianLens.fit(model, noised, towards="coda")
    with pytest.raises(ValueError, match="base is one of logit, coda"):
        RecalibratedLens.fit(model, noised, clean, base="tuned")


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name != "loopmdm"])
def test_lenses_are_fitted_on_any_looped_model(name):
    specimen = SPECIMENS[name]()
    model, n_loops = specimen.model, specimen.n_loops
    inputs = model.select(specimen.inputs, torch.arange(24) % model.batch_size(specimen.inputs))
    scored = model.scored(inputs)
    lens = TunedLens.fit(model, inputs, n_loops=n_loops, max_epochs=3, scored=scored)
    assert float((lens.held_out.kl - lens.held_out.kl_before).mean()) < 1e-4
    if name == "hrm-text":                                # its own code runs all but the last cycle under no_grad
        with pytest.raises(Unavailable, match="without gradients"):
            JacobianLens.fit(model, inputs, n_loops=n_loops, scored=scored)
        return
    jacobian = JacobianLens.fit(model, inputs, n_loops=n_loops, scored=scored)
    for fitted in (lens, jacobian):
        assert np.isfinite(read_lens(model, inputs, n_loops=n_loops, kind=fitted).kl_to_final).all()
