"""Linear models at many sites at once: ridge regression in closed form, logistic regression by L-BFGS.

All sites share the examples and the targets, so that a step is one batched product. The objectives are scikit-learn's,
and so are the optima: ‖y − X w − c‖² + α ‖w‖² of `Ridge`, and C Σ loss + ½ ‖w‖² of `LogisticRegression`; the intercept
is not penalised.

    coef, intercept = ridge(x, y, alpha=1.0)                  # x [site, point, d_model], y [point, output]
    coef, intercept, n_steps = logistic(x, y, C=1.0, n_classes=6)      # coef [site, d_model, output]
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from probes.measurement import check_finite

MEMORY = 12
"""Pairs of steps and changes of the gradient that L-BFGS keeps (Nocedal & Wright 2006, chapter 7)."""


def ridge(x: Float[Tensor, "site point d_model"], y: Float[Tensor, "point output"], *,
          alpha: float | Float[Tensor, "site"] = 1.0,
          ) -> tuple[Float[Tensor, "site d_model output"], Float[Tensor, "site output"]]:
    """Coefficients and intercepts of ridge regression at every site, in float64.

    Raises ValueError for an ``alpha`` that is not above 0, no point, and features that are not finite.
    """
    alphas = torch.as_tensor(alpha, dtype=torch.double, device=x.device).expand(len(x))
    if not bool((alphas > 0).all()):
        raise ValueError(f"alpha must be above 0, not {float(alphas.min())}: 1e-6 is next to none.")
    wide, mean = _centred(x.double())
    wanted = y.to(x.device, torch.double)
    offset = wanted.mean(0)
    gram = wide.mT @ wide
    gram.diagonal(dim1=-2, dim2=-1).add_(alphas[:, None])
    coef = torch.cholesky_solve(wide.mT @ (wanted - offset), torch.linalg.cholesky(gram))
    return coef, offset - (mean @ coef)[:, 0]


def logistic(x: Float[Tensor, "site point d_model"], y: Float[Tensor, "point output"], *, n_classes: int,
             C: float | Float[Tensor, "site"] = 1.0, tol: float = 1e-4, max_iter: int = 500,
             ) -> tuple[Float[Tensor, "site d_model output"], Float[Tensor, "site output"], Float[Tensor, "site"]]:
    """Coefficients, intercepts and numbers of steps of logistic regression, in x's precision (float32 at least).

    The outputs are targets side by side: each takes ``n_classes`` columns of ``y``, which hold a softmax's shares, or
    one column, a sigmoid's share, where ``n_classes`` is 1. Ends when no entry of the mean gradient exceeds ``tol`` in
    the solver's own units (about those of features of unit variance), or after ``max_iter`` steps.

    L-BFGS in the metric of Böhning's bound on the second derivative (1992: XᵀX/2, or XᵀX/4 of a sigmoid), in which a
    step of length 1 never overshoots; each site has its own line search. Raises ValueError for a C that is not above
    0, columns that are no multiple of ``n_classes``, no point, and features that are not finite.
    """
    if y.shape[1] % n_classes:
        raise ValueError(f"y has {y.shape[1]} columns, which is no multiple of n_classes = {n_classes}.")
    precision = torch.double if x.dtype == torch.double else torch.float
    strength = torch.as_tensor(C, dtype=precision, device=x.device).expand(len(x))
    if not bool((strength > 0).all()):
        raise ValueError(f"C must be above 0, not {float(strength.min())}: a small C is a strong penalty.")
    centred, mean = _centred(x.to(precision))
    n = x.shape[1]
    weight = 1 / (strength * n)                                                     # of ½‖w‖², per point
    bound = (centred.mT @ centred).double() / n * (0.25 if n_classes == 1 else 0.5)
    bound.diagonal(dim1=-2, dim2=-1).add_(weight[:, None].double())
    inverse = torch.linalg.inv(torch.linalg.cholesky(bound)).to(precision)          # L⁻¹, of L Lᵀ = bound
    problem = _Problem(centred @ inverse.mT, y.to(x.device, precision), weight, inverse, n_classes)
    free, steps = problem.solve(tol, max_iter)
    coef = inverse.mT @ free[:, :-1]
    intercept = free[:, -1] - (mean @ coef)[:, 0]
    if n_classes > 1:                                                    # a softmax takes no notice of what all share
        shares = intercept.unflatten(-1, (-1, n_classes))
        intercept = (shares - shares.mean(-1, keepdim=True)).flatten(1)
    return coef, intercept, steps


# -------------------------------------------------------------------------------------- private

def _centred(x: Float[Tensor, "site point d_model"]) -> tuple[Tensor, Float[Tensor, "site 1 d_model"]]:
    if not x.shape[1]:
        raise ValueError("there is no point to fit on.")
    check_finite(x, "features")
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


class _Problem:
    """Mean loss + penalty over free = [V; intercept] with w = L⁻ᵀ V, so that features are x L⁻ᵀ."""

    def __init__(self, features: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, n_classes: int):
        self.features, self.y, self.n_classes = features, y, n_classes
        self.penalty = inverse @ inverse.mT * weight[:, None, None]                 # of V
        share = y.mean(0).clamp(1e-6, 1 - 1e-6)
        start = torch.logit(share) if n_classes == 1 else share.log()
        self.start = torch.cat([features.new_zeros(len(features), features.shape[-1], y.shape[1]),
                                start.expand(len(features), 1, -1)], 1)

    def __call__(self, free: Float[Tensor, "site d_free output"]) -> tuple[Float[Tensor, "site"], Tensor]:
        """The objective of each site, and its gradient."""
        v, intercept, n = free[:, :-1], free[:, -1:], self.features.shape[1]
        score = torch.baddbmm(intercept.expand(-1, n, -1), self.features, v)
        if self.n_classes == 1:
            loss = binary_cross_entropy_with_logits(score, self.y.expand_as(score), reduction="none").sum((1, 2))
            residual = score.sigmoid_().sub_(self.y)
        else:
            log_p = score.unflatten(-1, (-1, self.n_classes)).log_softmax(-1).flatten(2)
            loss, residual = -(log_p * self.y).sum((1, 2)), log_p.exp_().sub_(self.y)
        pulled = self.penalty @ v
        gradient = torch.cat([self.features.mT @ residual / n + pulled, residual.mean(1, keepdim=True)], 1)
        return loss / n + (v * pulled).sum((1, 2)) / 2, gradient

    def solve(self, tol: float, max_iter: int) -> tuple[Float[Tensor, "site d_free output"], Float[Tensor, "site"]]:
        """L-BFGS with backtracking at each site on its own; a site that has arrived stands still."""
        at = self.start
        value, gradient = self(at)
        taken = torch.ones(len(at), dtype=at.dtype, device=at.device)
        steps: list[Tensor] = []
        changes: list[Tensor] = []
        for _ in range(max_iter):
            open_ = gradient.abs().amax((1, 2)) > tol
            if not bool(open_.any()):
                break
            direction = -_two_loop(gradient, steps, changes)
            slope = _dot(direction, gradient)
            uphill = slope >= 0
            direction = torch.where(uphill[:, None, None], -gradient, direction)
            slope = torch.where(uphill, -_dot(gradient, gradient), slope)
            moved, new_value, new_gradient, arrived = self._search(at, value, gradient, direction, slope, open_)
            if not bool(arrived.any()):
                break                                                              # at the precision of the arithmetic
            taken += arrived
            steps.append(moved - at)
            changes.append(new_gradient - gradient)
            del steps[:-MEMORY], changes[:-MEMORY]
            at, value, gradient = moved, new_value, new_gradient
        return at, taken

    def _search(self, at: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, slope: Tensor,
                open_: Bool[Tensor, "site"]) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "site"]]:
        """Step lengths that satisfy Armijo's condition; a site without one stays."""
        size = torch.where(open_, 1.0, 0.0).to(at.dtype)
        rounding = torch.finfo(at.dtype).eps
        for _ in range(12):
            moved = at + size[:, None, None] * direction
            new_value, new_gradient = self(moved)
            good = new_value <= value + 1e-4 * size * slope + rounding * value.abs()
            if bool(good.all()):
                break
            size = torch.where(good, size, size / 4)
        stays = ~good
        keep = stays[:, None, None]
        return (torch.where(keep, at, moved), torch.where(stays, value, new_value),
                torch.where(keep, gradient, new_gradient), good & (size > 0))


def _two_loop(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The two-loop recursion of L-BFGS (Nocedal & Wright 2006, algorithm 7.4); the metric of the start is 1."""
    q, kept = gradient.clone(), []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        curvature = _dot(s, y)
        rho = torch.where(curvature > 1e-12, 1 / curvature.clamp_min(1e-12), 0.0)
        a = rho * _dot(s, q)
        q -= a[:, None, None] * y
        kept.append((s, y, rho, a))
    if steps:
        curvature, norm = _dot(steps[-1], changes[-1]), _dot(changes[-1], changes[-1])
        q *= torch.where(curvature > 1e-12, curvature / norm.clamp_min(1e-24), 1.0)[:, None, None]
    for s, y, rho, a in reversed(kept):
        q += (a - rho * _dot(y, q))[:, None, None] * s
    return q


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, "site"]:
    return (a * b).sum((1, 2))
