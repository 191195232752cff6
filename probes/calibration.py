"""Recalibrated answers: what an answer tells, apart from how sure it is of it.

An answer that was read from an unusual state (a run cut short, a loop left out or exchanged) may be wrongly sure of
itself, or wrongly unsure; neither is information. It is therefore read as softmax(a · logits + b · log prior) with
a ≥ 0 and b fitted on the other half of the examples: temperature scaling (1706.04599) that can fall back on the
frequencies of the answers. An answer that tells nothing then costs what the frequencies cost, however sure it was.

    nll = calibrated(logits, torch.nn.functional.one_hot(targets, n_classes).float(), half)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RULED_OUT = 50.0
"""How far below the largest logit, in nats, an answer is out of the question (a mask that is never predicted)."""

FIT_POINTS = 4096
"""Scored positions that a calibration is fitted on, at most."""

RIDGE = 1e-3
"""Weight of the pull towards the answers' frequencies alone (a = 0, b = 1), per point."""


def calibrated(logits: Float[Tensor, "point vocab"], wanted: Float[Tensor, "point vocab"], half: Bool[Tensor, "point"],
               ) -> Float[Tensor, "point"]:
    """Cross-entropy [nat] of the recalibrated answers from the distributions ``wanted``.

    ``half`` says which half of the examples a point belongs to; each half is read with what the other one fitted, and
    the prior is the other half's mean of ``wanted``. Logits that are not finite count as ruled out.
    """
    logits = logits.float().nan_to_num(-1e30, 1e30, -1e30)
    logits = (logits - logits.amax(-1, keepdim=True)).clamp_min(-RULED_OUT)
    possible = logits[logits > -RULED_OUT]
    logits = logits / possible.square().mean().sqrt().clamp_min(1e-12)
    found = logits.new_empty(len(logits))
    for judged in (False, True):
        rest, fit = half == judged, half != judged
        if not bool(rest.any()):
            continue
        if not bool(fit.any()):
            fit = rest
        prior = log_prior(wanted[fit])
        chosen = torch.nonzero(fit)[:, 0]
        chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), FIT_POINTS)).long()]
        a, b = _scales(logits[chosen], prior, wanted[chosen])
        found[rest] = -((a * logits[rest] + b * prior).log_softmax(-1) * wanted[rest]).sum(-1)
    return found


def log_prior(wanted: Float[Tensor, "point vocab"]) -> Float[Tensor, "vocab"]:
    """log frequency of each class, half an observation added to each (Krichevsky & Trofimov 1981)."""
    count = wanted.sum(0) + 0.5
    return (count / count.sum()).log()


def _scales(logits: Float[Tensor, "point vocab"], prior: Float[Tensor, "vocab"], wanted: Float[Tensor, "point vocab"],
            ) -> tuple[float, float]:
    """The a ≥ 0 and b of the smallest cross-entropy: convex in two numbers, by damped Newton steps."""
    feature = torch.stack([logits, prior.expand_as(logits)])                     # [2, point, vocab]
    true = (feature * wanted).sum((1, 2)) / len(wanted)
    rest = true.new_tensor([0.0, 1.0])

    def value(at: Tensor) -> Tensor:
        return ((at[0] * feature[0] + at[1] * feature[1]).logsumexp(-1).mean() - at @ true
                + RIDGE * (at - rest).square().sum() / 2)

    at = rest.clone()
    now = value(at)
    for _ in range(30):
        p = (at[0] * feature[0] + at[1] * feature[1]).softmax(-1)
        mean = (p * feature).sum(-1)                                             # [2, point]
        gradient = mean.mean(1) - true + RIDGE * (at - rest)
        weighted = p * feature
        second = torch.stack([(weighted[f] * feature[g]).sum(-1).mean() for f in (0, 1) for g in (0, 1)]).view(2, 2)
        second = second - mean @ mean.T / len(wanted)
        step = torch.linalg.solve(second + RIDGE * torch.eye(2, dtype=at.dtype, device=at.device), gradient)
        size = 1.0
        while size > 1e-3:
            proposed = at - size * step
            proposed[0] = proposed[0].clamp_min(0.0)
            if (reached := value(proposed)) < now - 1e-6:
                break
            size /= 2
        else:
            break
        at, now = proposed, reached
    return float(at[0]), float(at[1])
