"""Linear probes as scikit-learn estimators, which also fit all sites of a recording at once.

    probe = LogisticProbe(C=[0.01, 0.1, 1.0]).fit(features, labels, groups=example)      # C by cross-validation
    probe.score(other_features, other_labels); probe.coef_                               # [class, d_model]
    sites = LogisticProbe().fit_sites(list_of_features, labels)                          # one per site, batched
    sites.predict(list_of_features); sites.probe(3)                                      # a fitted LogisticProbe

The objectives are those of scikit-learn's `LogisticRegression`, `RidgeClassifier` and `Ridge`. Labels are [point], or
[point, target] for several targets at once, which is multi-label where they are yes and no.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin, clone
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from probes.linear.solvers import logistic, ridge
from probes.linear.targets import Classes, Values

CHUNK_ELEMENTS = 2 ** 24
"""Features fitted at a time: as many sites as hold this many numbers, and one at least."""

Sites = Sequence[Tensor] | Tensor
"""Features [site, point, d_model], or one [point, d_model] per site, which need not lie side by side in memory."""


class Probe(BaseEstimator, ABC):
    """What all probes share: a penalty, its choice by cross-validation, and fitting at many sites."""

    definition: str
    scale: bool
    cv: int

    def fit(self, X: Any, y: Any, groups: Any = None) -> Probe:
        """Fits to features X [point, d_model] and y [point] or [point, target].

        Where ``groups`` [point] are given, such as the example of each position, the points of one group are on the
        same side in cross-validation. Sets ``coef_`` and ``intercept_`` in scikit-learn's shapes, ``penalty_`` (the C
        or alpha in use) and ``n_iter_``.
        """
        X, y = validate_data(self, X, y, multi_output=True, dtype=[np.float64, np.float32],
                             y_numeric=isinstance(self, RegressionProbe))
        self.fit_sites([torch.from_numpy(np.array(X))], y, groups)._give(self, 0)
        return self

    def fit_sites(self, features: Sites, y: Any, groups: Any = None) -> SiteProbes:
        """One probe per site, all for the same ``y`` [point] or [point, target]; the estimator stays as it was.

        Raises ValueError for a penalty that is not above 0, numbers of points that differ, features that are not
        finite, and fewer groups than folds where the penalty is to be chosen.
        """
        labels, groups = _array(y), None if groups is None else _array(groups)
        targets = self._targets(labels)
        wanted = torch.from_numpy(targets.columns(labels))
        parts = [self._fit_chunk(chunk, wanted, targets, groups) for chunk in _chunks(features, len(labels))]
        return SiteProbes(clone(self), targets, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def direction(self, label: Any = None) -> Float[Tensor, "d_model"]:
        """The unit vector along which a score grows fastest; for `hooks.edits.steer`.

        ``label`` is one of ``classes_`` where there is one target, the target's index where there are several, and may
        be left out where there is one score. Raises ValueError for any other, and for a probe that reads nothing.
        """
        check_is_fitted(self)
        vector = torch.as_tensor(np.array(self._row(label)))
        if not bool(vector.any()):
            raise ValueError("all coefficients are 0: the score does not depend on the features, and has no direction.")
        return vector / vector.norm()

    # ------------------------------------------------------------------------------ private

    @abstractmethod
    def _targets(self, y: np.ndarray) -> Classes | Values:
        """What ``y`` asks for."""

    @abstractmethod
    def _strengths(self) -> list[float]:
        """The penalties to choose from, the strongest first."""

    @abstractmethod
    def _solve(self, x: Tensor, wanted: Tensor, targets: Any, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients, intercepts and the number of steps taken, each [site, …]."""

    def _read(self, X: Any) -> tuple[Any, Float[Tensor, "point column"]]:
        """What is asked for, and its scores."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        coef = np.reshape(self.coef_, (-1, X.shape[1]))
        scores = X @ coef.T.astype(X.dtype) + np.reshape(self.intercept_, -1).astype(X.dtype)
        return self._fitted, torch.from_numpy(scores)

    def _row(self, label: Any) -> np.ndarray:
        rows, targets = np.reshape(self.coef_, (-1, self.n_features_in_)), self._fitted
        if label is None and len(rows) == 1:
            return rows[0]
        one_of_classes = isinstance(targets, Classes) and targets.n_targets is None
        known = targets.values.tolist() if one_of_classes else list(range(targets.n_targets or 1))
        if label not in known or len(rows) not in (1, len(known)):
            raise ValueError(f"label must be one of {known}, with a score of its own, not {label!r}.")
        index = known.index(label)
        return rows[index] if len(rows) == len(known) else rows[0] * (2 * index - 1)

    def _fit_chunk(self, x: Float[Tensor, "site point d_model"], wanted: Float[Tensor, "point column"],
                   targets: Classes | Values, groups: np.ndarray | None) -> tuple[Tensor, ...]:
        size = torch.ones(len(x), dtype=x.dtype, device=x.device)
        if self.scale:
            size = torch.linalg.vector_norm(x, dim=(1, 2)).div(x[0].numel() ** 0.5).clamp_min(1e-30)
            x = x / size[:, None, None]
        strengths = self._strengths()
        index = torch.zeros(len(x), dtype=torch.long)
        if len(strengths) > 1:
            index = self._choose(x, wanted, targets, groups, strengths)
        penalty = torch.tensor(strengths, dtype=torch.double)[index]
        coef, intercept, steps = self._solve(x, wanted, targets, penalty)
        return (coef / size.to(coef)[:, None, None]).cpu(), intercept.cpu(), penalty, steps.cpu()

    def _choose(self, x: Tensor, wanted: Tensor, targets: Classes | Values, groups: np.ndarray | None,
                strengths: list[float]) -> Tensor:
        """The index of the penalty that predicts the folds left out best, per site; the strongest of equals."""
        n = x.shape[1] if groups is None else len(np.unique(groups))
        if n < self.cv:
            raise ValueError(f"{self.cv} folds need as many {'points' if groups is None else 'groups'}, and n_samples "
                             f"= {n}: give more, or one penalty instead of several.")
        folds = KFold(self.cv, shuffle=True, random_state=0) if groups is None else GroupKFold(self.cv)
        quality = torch.zeros(len(x), len(strengths), dtype=torch.double)
        for inside, outside in folds.split(np.zeros(x.shape[1]), groups=groups):
            for index, strength in enumerate(strengths):
                penalty = torch.full((len(x),), strength, dtype=torch.double)
                coef, intercept, _ = self._solve(x[:, inside], wanted[inside], targets, penalty)
                columns = x[:, outside].to(coef.dtype) @ coef + intercept[:, None]
                quality[:, index] += targets.quality(columns.cpu(), wanted[outside]) * len(outside)
        return (quality >= quality.amax(1, keepdim=True) - 1e-9).double().argmax(1)


class _Classifier(ClassifierMixin, Probe):
    """A probe that answers with a class."""

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores: of the second class [point] where there are two, else [point, class].

        Several targets stand on an axis after ``point``.
        """
        targets, columns = self._read(X)
        return targets.scores(columns).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The class with the largest score, [point] or [point, target]."""
        targets, columns = self._read(X)
        return self.classes_[targets.chosen(columns).numpy()]

    def _targets(self, y: np.ndarray) -> Classes:
        if y.ndim == 1:
            check_classification_targets(y)
        return Classes.of(y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags


class LogisticProbe(_Classifier):
    """Logistic regression: a softmax over classes, or a sigmoid where there are two.

    ``C`` is the inverse of the penalty ½‖w‖² as in `LogisticRegression`, a number, or several of which ``cv``-fold
    cross-validation takes the most accurate. ``scale`` divides the features of a site by their root mean square
    before the penalty weighs in, so that C means the same wherever the stream has grown; coefficients are for the
    features as they come.
    """

    definition = "logistic regression with an intercept; the class of the largest score is predicted"

    def __init__(self, C: float | Sequence[float] = 1.0, *, cv: int = 5, scale: bool = False, tol: float = 1e-4,
                 max_iter: int = 500):
        self.C, self.cv, self.scale, self.tol, self.max_iter = C, cv, scale, tol, max_iter

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [point, class]; with several targets [point, target(, class)], of the second class of two."""
        targets, columns = self._read(X)
        return targets.probabilities(columns).numpy()

    def _strengths(self) -> list[float]:
        return sorted(float(c) for c in np.atleast_1d(self.C))

    def _solve(self, x: Tensor, wanted: Tensor, targets: Classes, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logistic(x, wanted, n_classes=targets.per_target, C=penalty, tol=self.tol, max_iter=self.max_iter)


class RidgeProbe(_Classifier):
    """Ridge regression on targets of ±1, one class against the rest, in closed form (`RidgeClassifier`).

    ``alpha`` weighs ‖w‖², a number, or several of which ``cv``-fold cross-validation takes the most accurate; ``scale``
    as in `LogisticProbe`.
    """

    definition = "ridge regression on one-vs-rest targets ±1 with an intercept; the class of the largest score is " \
                 "predicted"

    def __init__(self, alpha: float | Sequence[float] = 1.0, *, cv: int = 5, scale: bool = False):
        self.alpha, self.cv, self.scale = alpha, cv, scale

    def _strengths(self) -> list[float]:
        return _falling(self.alpha)

    def _solve(self, x: Tensor, wanted: Tensor, targets: Classes, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *ridge(x, 2 * wanted - 1, alpha=penalty), torch.ones(len(x))


class RegressionProbe(MultiOutputMixin, RegressorMixin, Probe):
    """Ridge regression on values (`Ridge`); ``alpha`` and ``scale`` as in `RidgeProbe`, chosen by the square error."""

    definition = "ridge regression with an intercept"

    def __init__(self, alpha: float | Sequence[float] = 1.0, *, cv: int = 5, scale: bool = False):
        self.alpha, self.cv, self.scale = alpha, cv, scale

    def predict(self, X: Any) -> np.ndarray:
        """Values, [point] or [point, target]."""
        targets, columns = self._read(X)
        return targets.scores(columns).numpy()

    def _targets(self, y: np.ndarray) -> Values:
        return Values.of(y)

    def _strengths(self) -> list[float]:
        return _falling(self.alpha)

    def _solve(self, x: Tensor, wanted: Tensor, targets: Values, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *ridge(x, wanted, alpha=penalty), torch.ones(len(x))


@dataclass(frozen=True)
class SiteProbes:
    """Probes of one kind for one target, at many sites."""

    estimator: Probe
    targets: Classes | Values
    coef: Float[Tensor, "site d_model column"]
    intercept: Float[Tensor, "site column"]
    penalty: Float[Tensor, "site"]
    steps: Float[Tensor, "site"]

    def __len__(self) -> int:
        return len(self.coef)

    def probe(self, site: int) -> Probe:
        """The fitted estimator of one site."""
        fitted: Probe = clone(self.estimator)
        self._give(fitted, site)
        return fitted

    def columns_at(self, site: int, x: Float[Tensor, "point d_model"]) -> Float[Tensor, "point column"]:
        """Scores of one site's probe, on features of this or any other site."""
        return x.detach().to(self.coef.device, self.coef.dtype) @ self.coef[site] + self.intercept[site]

    def answers(self, site: int, x: Float[Tensor, "point d_model"]) -> np.ndarray:
        """Classes or values [point], or [point, target], that one site's probe gives."""
        chosen = self.targets.chosen(self.columns_at(site, x)).numpy()
        return self.targets.values[chosen] if isinstance(self.targets, Classes) else chosen

    def predict(self, features: Iterable[Float[Tensor, "point d_model"]]) -> np.ndarray:
        """The answers of each probe on features of its own site, [site, point] or [site, point, target]."""
        return np.stack([self.answers(site, x) for site, x in enumerate(features)])

    def _give(self, estimator: Probe, site: int) -> None:
        """Sets what an estimator has once fitted."""
        targets, coef, intercept = self.targets, self.coef[site].T.numpy(), self.intercept[site].numpy()
        if isinstance(targets, Classes):
            estimator.classes_ = targets.values
            if targets.n_targets is not None and targets.per_target > 1:
                shape = (targets.n_targets, targets.per_target)
                coef, intercept = coef.reshape(*shape, -1), intercept.reshape(shape)
        elif targets.n_targets is None:
            coef, intercept = coef[0], intercept[0]
        estimator.coef_, estimator.intercept_, estimator.penalty_ = coef, intercept, float(self.penalty[site])
        estimator.n_iter_ = int(self.steps[site])
        estimator.n_features_in_, estimator._fitted = self.coef.shape[1], targets


# -------------------------------------------------------------------------------------- private

def _falling(alpha: float | Sequence[float]) -> list[float]:
    return sorted((float(a) for a in np.atleast_1d(alpha)), reverse=True)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _chunks(features: Sites, n_points: int) -> Iterator[Float[Tensor, "site point d_model"]]:
    """Sites side by side, as many as CHUNK_ELEMENTS allow, in float32 or float64."""
    size = max(1, CHUNK_ELEMENTS // max(1, features[0].numel()))
    for start in range(0, len(features), size):
        chunk = [site.detach() for site in features[start:start + size]]
        if any(site.ndim != 2 or len(site) != n_points for site in chunk):
            raise ValueError(f"every site needs features [point, d_model] of {n_points} points, not "
                             f"{tuple(chunk[0].shape)}.")
        yield torch.stack([site if site.dtype in (torch.float, torch.double) else site.float() for site in chunk])
