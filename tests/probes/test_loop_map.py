"""Jacobians of a loop, Lyapunov exponents, steps of other sizes, perturbed starts: closed forms and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooks import LoopedModel, Unavailable, adopt
from probes.answers import Judge
from probes.loop_map import jacobian_spectrum, lyapunov
from probes.perturbed import basins, line_search
from tests.small import MASK, small_model
from tests.specimens import SPECIMENS

WIDTH, VOCAB, LOOPS = 4, 11, 6


class Loop(nn.Module):
    """x → M x + b at every position, read by a matrix."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.b.weight.data, self.b.bias.data = matrix, torch.zeros(WIDTH) if bias is None else bias

    def forward(self, tokens, n_loops=LOOPS):
        x = self.embed(tokens)
        for _ in range(n_loops):
            x = self.b(x)
        return self.out(x)


def looped(matrix: Tensor, bias: Tensor | None = None) -> tuple[LoopedModel, Tensor]:
    model = adopt(Loop(matrix, bias), layers=["b"], n_loops=LOOPS, readout="out")
    return model, torch.randint(0, VOCAB, (5, 3), generator=torch.Generator().manual_seed(1))


SHEAR = torch.tensor([[0.8, 3.0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.1]])
angle = torch.tensor(0.7)
TURN = torch.eye(4) * 0.2
TURN[:2, :2] = 1.1 * torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])


@pytest.mark.parametrize("matrix", [SHEAR, TURN, torch.eye(4)], ids=["shear", "turn", "identity"])
def test_norm_and_radius_are_those_of_the_matrix(matrix: Tensor) -> None:
    model, tokens = looped(matrix, torch.ones(WIDTH))
    found = jacobian_spectrum(model, tokens, n_iter=100, loops=[0, 5])
    np.testing.assert_allclose(found.norm, float(torch.linalg.matrix_norm(matrix, 2)), rtol=1e-4)
    np.testing.assert_allclose(found.radius, float(torch.linalg.eigvals(matrix).abs().max()), rtol=4e-3)
    assert found.loop.values.tolist() == [0, 5]
    assert found.norm.dims == ("loop", "example")
    assert float(found.norm_change.max()) < 1e-4


def test_exponents_are_those_of_the_product_of_all_loops() -> None:
    model, tokens = looped(SHEAR)
    found = lyapunov(model, tokens, n_exponents=2, n_iter=60)
    values = torch.linalg.svdvals(torch.linalg.matrix_power(SHEAR.double(), LOOPS))
    expected = values.log() / LOOPS                                  # every position has them, so each three times
    np.testing.assert_allclose(found.exponent, float(expected[0]), rtol=1e-3)
    several = lyapunov(model, tokens, n_exponents=4, n_iter=200)
    np.testing.assert_allclose(several.exponent[:3], float(expected[0]), rtol=1e-3)
    np.testing.assert_allclose(several.exponent[3], float(expected[1]), rtol=5e-2)
    one = torch.zeros(5, 3, dtype=torch.bool)
    one[:, 1] = True
    alone = lyapunov(model, tokens, n_exponents=2, n_iter=200, at=one)
    np.testing.assert_allclose(alone.exponent.mean("example"), expected[:2], rtol=1e-2)
    later = lyapunov(model, tokens, start=4, n_iter=60)
    two = torch.linalg.svdvals(torch.linalg.matrix_power(SHEAR.double(), 2)).log() / 2
    np.testing.assert_allclose(later.exponent, float(two[0]), rtol=1e-3)


def test_a_straight_line_neither_stretches_nor_contracts() -> None:
    model, tokens = looped(torch.eye(4), torch.ones(WIDTH))
    np.testing.assert_allclose(lyapunov(model, tokens, n_iter=5).exponent, 0, atol=1e-6)
    np.testing.assert_allclose(jacobian_spectrum(model, tokens, loops=[3], n_iter=10).radius, 1, rtol=1e-6)


def test_a_real_loops_norm_is_that_of_its_whole_jacobian() -> None:
    model = small_model(seed=2)
    tokens = torch.randint(0, MASK, (2, 4), generator=torch.Generator().manual_seed(3))
    found = jacobian_spectrum(model, tokens, n_loops=3, n_iter=150, loops=[1])
    part = jacobian_spectrum(model, tokens, n_loops=3, n_iter=150, loops=[1], at=torch.arange(4).expand(2, 4) < 2)
    states, _, context = model.run(tokens, 3)
    depths = context.topology.loop_depths()[1]
    for example in range(2):
        rows = context.rows(torch.tensor([example]))

        def loop(x: Tensor, rows: object = rows) -> Tensor:
            return model.walk(x.view(1, 4, -1), rows, depths[0], depths[-1] + 1).flatten()

        whole = torch.autograd.functional.jacobian(loop, states[depths[0]][example].flatten().detach())
        assert float(found.norm[0, example]) == pytest.approx(float(torch.linalg.matrix_norm(whole, 2)), rel=1e-3)
        inside = whole[:whole.shape[0] // 2, :whole.shape[1] // 2]              # the first two of four positions
        assert float(part.norm[0, example]) == pytest.approx(float(torch.linalg.matrix_norm(inside, 2)), rel=1e-3)
        radius = float(torch.linalg.eigvals(whole).abs().max())
        assert float(found.radius[0, example]) == pytest.approx(radius, rel=2e-2)


@pytest.mark.parametrize("name", list(SPECIMENS))
def test_every_model_has_a_spectrum_or_says_why_not(name: str) -> None:
    specimen = SPECIMENS[name]()
    if name == "hrm-text":
        with pytest.raises(Unavailable, match="without gradients"):
            jacobian_spectrum(specimen.model, specimen.inputs, n_loops=specimen.n_loops)
        return
    found = jacobian_spectrum(specimen.model, specimen.inputs, n_loops=specimen.n_loops, n_iter=8)
    assert np.isfinite(found.norm).all()
    assert (found.radius <= found.norm * 1.3).all()                  # 8 steps: neither has arrived


def test_steps_of_other_sizes_are_read_as_by_hand() -> None:
    model = small_model(seed=2)
    clean = torch.randint(0, MASK, (6, 8), generator=torch.Generator().manual_seed(3))
    noised = torch.where(torch.arange(8) % 2 == 0, MASK, clean)
    found = line_search(model, noised, targets=clean, n_loops=3, alphas=(0.0, 0.5, 1.0, 2.0))
    with torch.no_grad():
        states, logits, context = model.run(noised, 3)
    judge = Judge(logits, clean, noised == MASK)
    for loop, depths in enumerate(context.topology.loop_depths()):
        before, after = states[depths[0]], states[depths[-1] + 1]
        for alpha in (0.0, 0.5, 2.0):
            with torch.no_grad():
                nll = judge(model.coda(before + alpha * (after - before), context), torch.arange(6))[0]
            np.testing.assert_allclose(found.nll.sel(loop=loop, alpha=alpha), nll, rtol=1e-4)
    np.testing.assert_allclose(found.nll.sel(loop=2, alpha=1.0), judge(logits, torch.arange(6))[0], rtol=1e-5)
    nll = found.nll.values
    others = [[int((nll[k].sum(-1) - nll[k][:, e]).argmin()) for e in range(6)] for k in range(3)]
    expected = np.array([[nll[k, 2, e] - nll[k, others[k][e], e] for e in range(6)] for k in range(3)])
    np.testing.assert_allclose(found.gain_of_all, expected, atol=1e-6)
    assert (found.gain >= -1e-9).all()
    with pytest.raises(ValueError, match="alphas must hold 1"):
        line_search(model, noised, targets=clean, n_loops=3, alphas=(0.0, 2.0))


class Halfway(nn.Module):
    """A loop that goes from near 0 half of the way to a token's own direction, which the readout tells."""

    def __init__(self):
        super().__init__()
        self.embed, self.out, self.b = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), Grow()
        self.embed.weight.data, self.out.weight.data = 0.1 * torch.eye(WIDTH), 5 * torch.eye(WIDTH)

    def forward(self, tokens):
        return self.out(self.b(self.embed(tokens)))


class Grow(nn.Module):
    def forward(self, x):
        return 5 * x


def test_a_step_that_is_too_short_is_found_out_and_one_that_is_right_is_not() -> None:
    model = adopt(Halfway(), layers=["b"], n_loops=1, readout="out")
    tokens = torch.randint(0, WIDTH, (5, 3), generator=torch.Generator().manual_seed(1))
    scored = torch.ones_like(tokens, dtype=torch.bool)
    alphas = (0.0, 0.5, 1.0, 1.5, 2.0)
    found = line_search(model, tokens, targets=tokens, alphas=alphas, scored=scored)
    assert (found.best_of_all == 2.0).all()
    assert (found.gain_of_all > 0.1).all()
    wrong = line_search(model, tokens, targets=(tokens + 1) % WIDTH, alphas=alphas, scored=scored)
    assert (wrong.best_of_all == 0.0).all()


def test_a_contraction_forgets_its_start_at_its_rate_and_an_expansion_does_not() -> None:
    model, tokens = looped(0.5 * torch.eye(4), torch.ones(WIDTH))
    scored = torch.ones_like(tokens, dtype=torch.bool)
    found = basins(model, tokens, sizes=(0.1, 1.0), n_starts=3, n_loops=LOOPS, scored=scored)
    assert found.distance.dims == ("size", "start", "loop", "example")
    states = [state.detach() for state in model.run(tokens, LOOPS).states]
    size = torch.stack(states[1:]).norm(dim=-1)                                            # [loop, example, pos]
    expected = (1.0 * states[0].norm(dim=-1) * 0.5 ** torch.arange(1, LOOPS + 1)[:, None, None] / size).mean(-1)
    for start in range(3):
        np.testing.assert_allclose(found.distance.sel(size=1.0, start=start), expected, rtol=1e-4)
    assert (found.agreement.sel(size=0.1) >= found.agreement.sel(size=1.0) - 0.35).all()
    steady, _ = looped(torch.eye(4), torch.ones(WIDTH))
    line = basins(steady, tokens, sizes=(1.0,), n_starts=2, n_loops=LOOPS, scored=scored)
    assert (line.settling == LOOPS).all()                             # a sum never settles
    assert (line.own_settling == LOOPS).all()
    still, _ = looped(torch.eye(4))
    assert (basins(still, tokens, sizes=(0.1,), n_loops=LOOPS, scored=scored).own_settling == 1).all()


@pytest.mark.unchecked
def test_what_cannot_be_measured_is_refused() -> None:
    model, tokens = looped(SHEAR)
    with pytest.raises(ValueError, match="n_iter must be at least 8"):
        jacobian_spectrum(model, tokens, n_iter=2)
    with pytest.raises(ValueError, match=r"loops must be some of 0\.\.5"):
        jacobian_spectrum(model, tokens, loops=[6])
    with pytest.raises(ValueError, match="n_exponents must be between 1 and the state's 12"):
        lyapunov(model, tokens, n_exponents=13)
    with pytest.raises(ValueError, match="start must be one of the loops"):
        lyapunov(model, tokens, start=6)
    with pytest.raises(ValueError, match="sizes must be above 0"):
        basins(model, tokens, sizes=(0.0,))
    with pytest.raises(Unavailable, match=r"runs in float16, .* convert it with \.float\(\)"):
        jacobian_spectrum(small_model().half(), torch.zeros(2, 4, dtype=torch.long), n_loops=2)
