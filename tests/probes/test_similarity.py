"""CKA: against the naive formula with example × example kernels, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from probes import cka_between_depths, linear_cka
from tests.small import small_model, small_tokens


def two_views(n: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator) + 3
    return x, x @ torch.randn(5, 7, generator=generator) + torch.randn(n, 7, generator=generator) - 1


def naive_cka(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    """Kornblith et al. 2019, eq. 3 and 4, and Song et al. 2012, eq. 5, as printed."""
    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        if not unbiased:
            centre = np.eye(n) - np.full((n, n), 1 / n)
            return float(np.trace(k @ centre @ m @ centre) / (n - 1) ** 2)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        return float((np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
                      - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 30])
def test_cka_agrees_with_the_naive_formula(n: int, unbiased: bool) -> None:
    x, y = two_views(n, seed=3)
    with np.errstate(invalid="ignore"):  # with 4 examples an unbiased HSIC(K, K) may be negative
        expected = naive_cka(x.double().numpy(), y.double().numpy(), unbiased)
        np.testing.assert_allclose(float(linear_cka(x, y, unbiased)), expected, rtol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
def test_rotation_scale_and_offset_do_not_matter(unbiased: bool) -> None:
    x, y = two_views()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    np.testing.assert_allclose(linear_cka(x, 3 * x @ rotation + 100, unbiased), 1, rtol=1e-5)
    np.testing.assert_allclose(linear_cka(x, y, unbiased), linear_cka(y, x, unbiased), rtol=1e-9)
    assert float(linear_cka(x, y, unbiased)) < 0.99


def test_unrelated_states_score_zero_on_average_only_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(20, 10, generator=generator), torch.randn(20, 10, generator=generator)) for _ in range(200)]
    unbiased = np.mean([float(linear_cka(x, y)) for x, y in pairs])
    biased = np.mean([float(linear_cka(x, y, unbiased=False)) for x, y in pairs])
    assert abs(unbiased) < 0.02
    assert biased > 0.2


def test_between_depths_is_pair_by_pair() -> None:
    with torch.no_grad():
        _, rec = small_model().run_with_cache(small_tokens(), 3, names_filter="blocks.*.hook_resid_post")
        _, wide = small_model(seed=1, d_model=24).run_with_cache(small_tokens(), 1,
                                                                 names_filter="blocks.*.hook_resid_post")
    every = cka_between_depths(rec.residual_stream())
    np.testing.assert_allclose(np.diagonal(every), 1, rtol=1e-6)
    np.testing.assert_allclose(every, every.T, rtol=1e-6)
    first, last = rec["blocks.0.hook_resid_post"].flatten(0, 1), rec["blocks.3.hook_resid_post"].flatten(0, 1)
    np.testing.assert_allclose(every[0, -1], linear_cka(first, last), rtol=1e-6)
    across = cka_between_depths(rec.residual_stream(), wide.residual_stream())
    assert across.shape == (8, 4)
    assert across.layer_b.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(across[0, 2], linear_cka(first, wide["blocks.2.hook_resid_post@0"].flatten(0, 1)),
                               rtol=1e-6)


@pytest.mark.unchecked
def test_states_of_different_examples_are_refused() -> None:
    x, y = two_views()
    with pytest.raises(ValueError, match="with the same examples"):
        linear_cka(x, y[:-1])
    with pytest.raises(ValueError, match="CKA needs at least 4 examples, not 3"):
        linear_cka(x[:3], y[:3])
    with torch.no_grad():
        runs = [small_model().run_with_cache(small_tokens(batch), 1, names_filter="blocks.*.hook_resid_post")[1]
                for batch in (2, 3)]
    with pytest.raises(ValueError, match="run both models on the same tokens"):
        cka_between_depths(runs[0].residual_stream(), runs[1].residual_stream())
