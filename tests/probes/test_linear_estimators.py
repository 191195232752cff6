"""Linear probes as estimators: scikit-learn's own checks, its optima, batches equal to single fits, steering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.multioutput import MultiOutputClassifier
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor

from hooks.edits import steer
from probes.linear import LogisticProbe, RegressionProbe, RidgeProbe, estimators, site_features
from tests.small import small_model, small_tokens

SCALES = (1.0, 10.0, 0.1)


def data(n: int = 240, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three sites of different scale, badly conditioned; labels of three classes that the first site tells best."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, 6, generator=generator, dtype=torch.double) * torch.logspace(-1, 1, 6)
    x = x * torch.tensor(SCALES)[:, None, None] + 2
    direction = torch.randn(6, 3, generator=generator, dtype=torch.double) / torch.logspace(-1, 1, 6)[:, None]
    return x, ((x[0] - 2) @ direction + torch.randn(n, 3, generator=generator)).argmax(1)


@pytest.mark.unchecked
@pytest.mark.parametrize("probe", [RidgeProbe(), RidgeProbe(alpha=[0.1, 1.0], scale=True), LogisticProbe(),
                                   LogisticProbe(C=[0.1, 1.0], scale=True), RegressionProbe(),
                                   RegressionProbe(alpha=[0.1, 1.0], scale=True)], ids=str)
def test_scikit_learn_takes_them_for_its_own(probe: Any) -> None:
    failed = [each for each in check_estimator(probe, on_fail=None, on_skip=None) if each["status"] == "failed"]
    assert not failed


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_optima_are_those_of_scikit_learn(n_classes: int, penalty: float) -> None:
    x, y = data()
    y = y.clamp(max=n_classes - 1).numpy()
    for probe, peer in ((RidgeProbe(alpha=penalty), RidgeClassifier(alpha=penalty, solver="cholesky")),
                        (LogisticProbe(C=penalty, tol=1e-9, max_iter=5000),
                         LogisticRegression(C=penalty, solver="newton-cg", tol=1e-12, max_iter=5000))):
        sites = probe.fit_sites(x, y)
        for site, features in enumerate(x.numpy()):
            theirs = peer.fit(features, y)
            ours = sites.probe(site)
            np.testing.assert_allclose(ours.coef_, np.atleast_2d(theirs.coef_), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(sites.predict(x)[site], theirs.predict(features))
            np.testing.assert_allclose(ours.decision_function(features), theirs.decision_function(features), atol=1e-3)
    ours = LogisticProbe(C=penalty, tol=1e-9).fit(x[0].numpy(), y)
    theirs = LogisticRegression(C=penalty, tol=1e-9, max_iter=3000).fit(x[0].numpy(), y)
    np.testing.assert_allclose(ours.predict_proba(x[0].numpy()), theirs.predict_proba(x[0].numpy()), atol=1e-3)


def test_regression_is_ridge_with_one_value_or_several() -> None:
    x, y = data()
    values = torch.stack([y.double(), x[0, :, 2] ** 2], 1).numpy()
    for wanted in (values[:, 0], values):
        ours, theirs = RegressionProbe(alpha=2.0).fit(x[1].numpy(), wanted), Ridge(alpha=2.0).fit(x[1].numpy(), wanted)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-7)
        np.testing.assert_allclose(ours.predict(x[1].numpy()), theirs.predict(x[1].numpy()), rtol=1e-7)
        assert ours.coef_.shape == theirs.coef_.shape


def test_several_targets_are_as_many_fits() -> None:
    x, y = data()
    labels = torch.stack([y == 0, y == 2, x[0, :, 1] > 2], 1).long().numpy()
    ours = LogisticProbe(tol=1e-9).fit(x[0].numpy(), labels)
    theirs = MultiOutputClassifier(LogisticRegression(tol=1e-10, max_iter=3000)).fit(x[0].numpy(), labels)
    np.testing.assert_array_equal(ours.predict(x[0].numpy()), theirs.predict(x[0].numpy()))
    np.testing.assert_allclose(ours.coef_, [each.coef_[0] for each in theirs.estimators_], rtol=2e-2, atol=2e-3)
    three = torch.stack([y, (y + 1) % 3], 1).numpy()
    for probe in (LogisticProbe(tol=1e-9), RidgeProbe()):
        both = probe.fit(x[0].numpy(), three)
        assert both.coef_.shape == (2, 3, 6)
        answers = both.predict(x[0].numpy())
        for target in range(2):
            alone = type(probe)().fit(x[0].numpy(), three[:, target])
            assert (answers[:, target] == alone.predict(x[0].numpy())).mean() > 0.99


@pytest.mark.parametrize("probe", [RidgeProbe(alpha=0.3), LogisticProbe(tol=1e-8), RidgeProbe(scale=True)], ids=str)
def test_a_batch_of_sites_is_as_many_fits(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    together = probe.fit_sites(x, y)
    monkeypatch.setattr(estimators, "CHUNK_ELEMENTS", 1)                                       # one site at a time
    torch.testing.assert_close(probe.fit_sites(x, y).coef, together.coef, rtol=1e-4, atol=1e-5)
    for site in range(3):
        alone = probe.fit(x[site].numpy(), y.numpy())
        np.testing.assert_allclose(alone.coef_, together.probe(site).coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(together.answers(site, x[0]), alone.predict(x[0].numpy()))


def test_scaling_weighs_every_site_alike_and_coefficients_are_for_features_as_they_come() -> None:
    x, y = data()
    plain, scaled = (RidgeProbe(alpha=5.0, scale=scale).fit_sites([x[0], 100 * x[0]], y) for scale in (False, True))
    np.testing.assert_allclose(scaled.coef[0], 100 * scaled.coef[1], rtol=1e-9)
    assert not np.allclose(plain.coef[0], 100 * plain.coef[1], rtol=1e-2)
    size = x[0].square().mean().sqrt()
    theirs = RidgeClassifier(alpha=5.0).fit((x[0] / size).numpy(), y.numpy())
    np.testing.assert_allclose(scaled.probe(0).decision_function(x[0].numpy()),
                               theirs.decision_function((x[0] / size).numpy()), atol=1e-9)


@pytest.mark.parametrize("grid", [[1e-4, 1e-1, 10.0], [10.0, 1e-4]])
def test_the_penalty_is_the_one_that_predicts_the_groups_left_out(grid: list[float]) -> None:
    x, y = data(60)
    noise = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(2))
    y = torch.where(torch.arange(60) % 4 == 0, noise, y)
    groups = np.arange(60) // 3
    for probe, peer, name in ((LogisticProbe(C=grid, tol=1e-8), LogisticRegression(tol=1e-8, max_iter=2000), "C"),
                              (RidgeProbe(alpha=[1000 * c for c in grid]), RidgeClassifier(), "alpha")):
        penalties = grid if name == "C" else [1000 * c for c in grid]
        search = GridSearchCV(peer, {name: penalties}, cv=GroupKFold(5)).fit(x[0].numpy(), y.numpy(), groups=groups)
        quality = dict(zip(penalties, search.cv_results_["mean_test_score"], strict=True))
        chosen = probe.fit(x[0].numpy(), y.numpy(), groups=groups).penalty_
        assert quality[chosen] == pytest.approx(max(quality.values()), abs=1e-9)
    with pytest.raises(ValueError, match="5 folds need as many groups, and n_samples = 3"):
        LogisticProbe(C=grid).fit(x[0].numpy(), y.numpy(), groups=np.arange(60) // 20)


def test_a_direction_raises_its_own_class_when_it_is_added_to_the_stream() -> None:
    model, tokens = small_model(), small_tokens(batch=48, seed=1)
    features, depths, topology = site_features(model, tokens, n_loops=3)
    labels = tokens % 3
    index = topology.loop_depths()[1][0]
    site = topology.site_at(index, "hook_resid_post")
    probe = LogisticProbe().fit(features[index].numpy(), labels.flatten().numpy())
    for label in (0, 1, 2):
        with model.hooks([steer(site, probe.direction(label), 5.0)], n_loops=3):
            moved, _, _ = site_features(model, tokens, n_loops=3)
        before, after = (probe.decision_function(each[index].numpy()) for each in (features, moved))
        np.testing.assert_allclose((after - before)[:, label], 5 * np.linalg.norm(probe.coef_[label]), rtol=1e-3)
    two = LogisticProbe().fit(features[index].numpy(), (labels > 0).flatten().numpy())
    torch.testing.assert_close(two.direction(True), -two.direction(False))
    torch.testing.assert_close(two.direction(), two.direction(True))
    assert depths == list(range(topology.depth))


@pytest.mark.unchecked
def test_what_cannot_be_fitted_is_refused() -> None:
    x, y = data()
    with pytest.raises(ValueError, match=r"alpha must be above 0, not 0\.0"):
        RidgeProbe(alpha=0.0).fit_sites(x, y)
    with pytest.raises(ValueError, match=r"C must be above 0, not -1\.0"):
        LogisticProbe(C=-1.0).fit_sites(x, y)
    with pytest.raises(ValueError, match=r"every site needs features \[point, d_model\] of 10 points, not \(240, 6\)"):
        RidgeProbe().fit_sites(x, y[:10])
    with pytest.raises(ValueError, match="features holds NaN"):
        LogisticProbe().fit_sites(x / 0, y)
    with pytest.raises(ValueError, match=r"label must be one of \[0, 1, 2\], .* not 3"):
        RidgeProbe().fit(x[0].numpy(), y.numpy()).direction(3)
    with pytest.raises(ValueError, match="Unknown label type"):
        RidgeProbe().fit(x[0].numpy(), x[0, :, 0].numpy())


def test_one_class_is_answered_always_and_features_that_say_nothing_give_the_commonest() -> None:
    x, y = data()
    for probe in (RidgeProbe(), LogisticProbe()):
        assert (probe.fit(x[0].numpy(), np.full(240, 7)).predict(x[0].numpy()) == 7).all()
        flat = probe.fit(np.zeros((240, 6)), y.numpy())
        with pytest.raises(ValueError, match="all coefficients are 0"):
            flat.direction(0)
        assert (flat.predict(np.zeros((3, 6))) == np.bincount(y).argmax()).all()
