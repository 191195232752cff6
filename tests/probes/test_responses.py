"""Responses of linear maps, whose Jacobians are known, and of models that must get the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hooks import adopt
from probes.cycles import own_loops, pseudo_loops
from probes.responses import responses
from studies.questions.controls import gated_copy
from tests.small import small_model, small_tokens

WIDTH = 6


class Linear(nn.Module):
    """Loops of layers that add a matrix product to the state."""

    def __init__(self, matrices, n_loops):
        super().__init__()
        self.layers, self.n_loops = nn.ModuleList(Step(matrix) for matrix in matrices), n_loops

    def forward(self, x):
        for _ in range(self.n_loops):
            for layer in self.layers:
                x = layer(x)
        return x


class Step(nn.Module):
    """x + A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        return x + x @ self.matrix.T


def adopted(matrices, n_loops=2):
    module = Linear(matrices, n_loops)
    return adopt(module, layers=["layers.0", "layers.1"][:len(matrices)], n_loops=n_loops)


def inputs(n=3):
    return torch.randn(n, 2, WIDTH, generator=torch.Generator().manual_seed(0))


def test_linear_layers_have_the_responses_of_their_matrices():
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(WIDTH, WIDTH, generator=generator) / 3 for _ in range(2))
    model = adopted([one, other])
    found = responses(model, inputs(), own_loops(model.topology()), n_directions=1, seed=5)
    v = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    expected = float(torch.cosine_similarity((v @ one.T).flatten(), (v @ other.T).flatten(), dim=0))
    np.testing.assert_allclose(found.cosine.sel(place=0, other_place=1), expected, atol=1e-3)
    np.testing.assert_allclose(found.cosine.sel(place=0, other_place=2), 1, atol=1e-4)
    np.testing.assert_allclose(found.cos_input, 1, atol=1e-4)
    assert float(found.cos_loop) == pytest.approx(1, abs=1e-4)
    assert float(found.cos_layer) == pytest.approx(expected, abs=1e-3)
    assert float(found.E) == pytest.approx(1, abs=1e-3)
    for name in found.data_vars:
        assert {"units", "definition", "source", "long_name"} <= set(found[name].attrs)


def test_one_layer_has_no_other_layer():
    model = adopted([torch.eye(WIDTH)], 3)
    found = responses(model, inputs(), own_loops(model.topology()))
    assert float(found.cos_loop) == pytest.approx(1, abs=1e-4)
    assert np.isnan(found.cos_layer)
    assert np.isnan(found.E)
    assert np.isnan(found.rho)          # another input changes nothing of a linear map


def test_a_layer_that_adds_nothing_has_no_response():
    model = adopted([torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH)])
    found = responses(model, inputs(), own_loops(model.topology()))
    assert np.isnan(found.cosine.sel(place=0)).all()
    assert float(found.cos_loop) == pytest.approx(1, abs=1e-4)


def test_a_gated_copy_has_the_responses_of_its_twin():
    twin = small_model(seed=2, n_loop_layers=4, max_loops=1)
    made, tokens = gated_copy(twin, 2), small_tokens(4)
    one = responses(made, tokens, own_loops(made.topology()))
    other = responses(twin, tokens, pseudo_loops(twin.topology(), 2))
    for name in ("E", "rho", "cosine"):
        np.testing.assert_allclose(one[name], other[name], atol=2e-3)


def test_what_cannot_be_compared_is_refused():
    model = adopted([torch.eye(WIDTH)])
    cycle = own_loops(model.topology())
    with pytest.raises(ValueError, match="another example"):
        responses(model, inputs(1), cycle)
    with pytest.raises(ValueError, match="n_directions"):
        responses(model, inputs(), cycle, n_directions=0)
