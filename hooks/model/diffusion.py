"""Masked diffusion: corrupting, the training bound, and sampling by unmasking.

The scaffolding of MDLM (2406.07524) with the schedule α_t = 1 − t: a token is masked with
probability t, the bound weighs the cross-entropy of masked positions by 1/t, and sampling
reveals masked positions over a number of denoising steps. Only **free** positions are ever
masked; given ones (a puzzle's clues) stay visible and carry no loss.

`exact_t` and `corrupt_exactly` mask an exact number of positions instead, which is the same bound with less
noise: the mask's size, of which the weight is the inverse, is then drawn evenly instead of twice at random.

    noised = corrupt(tokens, t, mask_token_id, free=free, generator=generator)
    loss = nelbo(model(noised, n_loops), tokens, noised, t, mask_token_id, free=free)
    trace = sample(model, prompt, SamplerConfig(n_steps=8, order="confidence"), generator=generator)
    trace = sample(model, prompt, SamplerConfig(n_steps=8), fwd_hooks=[ablate("blocks.2.hook_mlp_out", step=3)])
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks.contract import HookList
from hooks.edits import PlanEdit, in_step
from hooks.model.hooked import HookedLoopMDM
from hooks.model.inputs import AttentionMask, Tokens, as_given, masked_in, real_positions, take
from hooks.model.loopmdm import LoopMDM

T_MIN = 1e-3
"""Smallest noise level drawn in training; it bounds the weight 1/t."""


NoiseLevels = Literal["uniform", "bell"]


def antithetic_t(batch: int, *, levels: NoiseLevels = "uniform",
                 generator: torch.Generator | None = None) -> Float[Tensor, "batch"]:
    """Noise levels spread evenly over (0, 1] with one random shift (low-discrepancy, 2107.00630), shuffled.

    "bell" draws them from the standard logit-normal density, which has its mode at 1/2, in the same even way. A loss
    of such levels, weighted by 1/t as ever, is no longer the bound but a reweighting of it towards the middle levels:
    for training only (after 2605.13026, which reports faster training with a bell; the choice of density is ours).
    """
    return T_MIN + (1 - T_MIN) * _levels(batch, levels, generator)


def exact_t(n_free: Int[Tensor, "batch"], *, levels: NoiseLevels = "uniform",
            generator: torch.Generator | None = None) -> Float[Tensor, "batch"]:
    """Noise levels k/n for `corrupt_exactly`: of each example's n free positions k are to be masked, k ~ U{1..n}.

    With t = k/n, `nelbo` has the expectation that it has with `antithetic_t` and `corrupt` for a model that does not
    read t, up to T_MIN: a mask of a given size k has probability ∫ t^(k−1) (1−t)^(n−k) dt = 1 / (k · C(n, k)) under the
    weight 1/t, which is that of one of C(n, k) equally probable masks, of a size that is uniform, under the weight n/k.
    The sizes are spread evenly over the batch as in `antithetic_t`, "bell" included. Raises ValueError for an
    example without free positions.
    """
    if bool((n_free < 1).any()):
        raise ValueError("every example needs at least one free position: there is nothing to mask in some.")
    u = _levels(len(n_free), levels, generator).to(n_free.device)
    k = (1 + (u * n_free).floor().long()).minimum(n_free)   # u < 1, but u · n may round up to n
    return k / n_free


def corrupt_exactly(tokens: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"], mask_token_id: int, *,
                    free: Bool[Tensor, "batch pos"] | None = None, attention_mask: AttentionMask = None,
                    generator: torch.Generator | None = None) -> Int[Tensor, "batch pos"]:
    """Replace t · n of each example's n free tokens by the mask (rounded to a whole number), all choices alike.

    Padding is never free.
    """
    free = _free(tokens, free, attention_mask)
    device = generator.device if generator is not None else tokens.device
    rank = torch.rand(tokens.shape, generator=generator, device=device).to(tokens.device)
    if free is not None:
        rank = rank.masked_fill(~free, 2)                   # after all free ones
    n_free = torch.full_like(tokens[:, 0], tokens.shape[1]) if free is None else free.sum(1)
    quota = (t.to(tokens.device) * n_free).round().long()
    hit = rank.argsort(1).argsort(1) < quota[:, None]
    return tokens.masked_fill(hit, mask_token_id)


def corrupt(tokens: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"] | float, mask_token_id: int, *,
            free: Bool[Tensor, "batch pos"] | None = None, attention_mask: AttentionMask = None,
            generator: torch.Generator | None = None) -> Int[Tensor, "batch pos"]:
    """Replace each free token by the mask with probability ``t``, independently; never padding."""
    free = _free(tokens, free, attention_mask)
    level = torch.as_tensor(t, device=tokens.device).expand(len(tokens))[:, None]
    device = generator.device if generator is not None else tokens.device
    hit = torch.rand(tokens.shape, generator=generator, device=device).to(tokens.device) < level
    if free is not None:
        hit = hit & free
    return tokens.masked_fill(hit, mask_token_id)


def nelbo(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"],
          noised: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"], mask_token_id: int, *,
          free: Bool[Tensor, "batch pos"] | None = None, attention_mask: AttentionMask = None) -> Float[Tensor, ""]:
    """The negative ELBO of 2406.07524 in nats per free token: E Σ_masked (1/t) · −log p(x0) / #free.

    Padding is never free, and carries no loss. Raises ValueError if no position is free.
    """
    free = _free(tokens, free, attention_mask)
    masked = masked_in(noised, mask_token_id, attention_mask)
    nll = F.cross_entropy(logits[masked].float(), tokens[masked], reduction="none")
    weight = (1 / t)[:, None].expand(tokens.shape)[masked]
    n_free = tokens.numel() if free is None else int(free.sum())
    if not n_free:
        raise ValueError("no position of this batch is free, so that there is no token to take a mean over.")
    return (weight * nll).sum() / n_free


@dataclass(frozen=True)
class SamplerConfig:
    """How a sequence is unmasked."""

    n_steps: int = 8                    # denoising steps; the last one reveals everything still masked
    order: Literal["ancestral", "confidence"] = "ancestral"  # which positions are revealed at a step
    n_loops: int | None = None          # loops per step (None: max_loops); the bound, if adaptive
    exit_threshold: float | None = None  # adaptive looping: stop below this relative change of the state
    temperature: float = 1.0            # of the sampled tokens; 0 takes the most probable one

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, not {self.n_steps}.")
        if self.order not in ("ancestral", "confidence"):
            raise ValueError(f"order must be 'ancestral' or 'confidence', not {self.order!r}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}.")


@dataclass(frozen=True)
class DenoisingStep:
    """One step of the sampler, all tensors on the model's device."""

    step: int                                     # 0-based
    t: float                                      # noise level before the step
    before: Int[Tensor, "batch pos"]              # tokens the model saw
    after: Int[Tensor, "batch pos"]               # tokens after revealing
    predicted: Int[Tensor, "batch pos"]           # the token drawn at every position, revealed or not
    probability: Float[Tensor, "batch pos"]       # its probability
    loops_used: Int[Tensor, "batch"]

    @property
    def revealed(self) -> Bool[Tensor, "batch pos"]:
        """Positions that this step unmasked."""
        return self.before != self.after


@torch.no_grad()
def sample(model: LoopMDM, tokens: Tokens, config: SamplerConfig, *, generator: torch.Generator | None = None,
           on_step: Callable[[DenoisingStep], None] | None = None, fwd_hooks: HookList = (),
           attention_mask: AttentionMask = None) -> list[DenoisingStep]:
    """Unmask every masked position of ``tokens``; returns the trace, one entry per step.

    *ancestral* reveals each masked position with probability (t − s)/t in the step t → s; *confidence*
    reveals the share (t − s)/t of them (rounded up) whose drawn token is most probable. Revealed tokens
    never change, and padding (``attention_mask`` 0) is never revealed. ``on_step`` sees each step as it ends. The
    samples are ``trace[-1].after``.

    ``fwd_hooks`` are hooks and edits, as of ``HookedLoopMDM.run_with_hooks``. They act in every step, and edits with
    a ``step`` of their own in that one: ``steer(site, vector, step=3)``. What was in force before takes part too.
    Raises SiteError before the first step for sites that cannot fire and for a ``step`` that never comes.
    """
    mask = model.config.mask_token_id
    tokens, attention_mask = take(tokens, attention_mask)
    tokens, _ = model._checked(tokens, config.n_loops)
    real = real_positions(tokens, attention_mask)
    in_force = hooks_by_step(model, fwd_hooks, config)
    trace: list[DenoisingStep] = []
    for step in range(config.n_steps):
        t, s = 1 - step / config.n_steps, 1 - (step + 1) / config.n_steps
        masked = masked_in(tokens, mask, real)
        with in_force[step]():
            logits, loops_used = _denoise(model, tokens, config, t, real)
        predicted, probability = _draw(logits, mask, config.temperature, generator)
        reveal = _chosen(masked, probability, 1 - s / t, config.order, generator)
        after = torch.where(reveal, predicted, tokens)
        trace.append(DenoisingStep(step, t, tokens, after, predicted, probability, loops_used))
        if on_step is not None:
            on_step(trace[-1])
        tokens = after
    return trace


def hooks_by_step(model: LoopMDM, fwd_hooks: HookList,
                  config: SamplerConfig) -> list[Callable[[], AbstractContextManager[Any]]]:
    """For each step, the ``with`` block in which its hooks and edits are in force, each tried once without a forward.

    Raises SiteError for a site that cannot fire in its step, or a step that never comes.
    """
    if not fwd_hooks:
        return [nullcontext] * config.n_steps
    if not isinstance(model, HookedLoopMDM):
        raise ValueError("hooks and edits need a HookedLoopMDM; this is a bare LoopMDM.")
    if config.exit_threshold is not None and any(isinstance(entry, PlanEdit) for entry in fwd_hooks):
        raise ValueError("loops are skipped, repeated or swapped by an edit, and adaptive looping decides by itself "
                         "which loops run: leave out exit_threshold.")
    blocks: list[Callable[[], AbstractContextManager[Any]]] = [
        partial(model.hooks, fwd_hooks=in_step(fwd_hooks, step, config.n_steps), n_loops=config.n_loops)
        for step in range(config.n_steps)]
    for block in blocks:
        with block():
            pass
    return blocks


def _free(tokens: Tensor, free: Tensor | None, attention_mask: AttentionMask) -> Tensor | None:
    """Free positions that are no padding; None: all."""
    real = real_positions(as_given(tokens), attention_mask)
    return real if free is None else free if real is None else free & real


def _levels(batch: int, levels: NoiseLevels, generator: torch.Generator | None) -> Float[Tensor, "batch"]:
    """Quantiles of the density of noise levels in [0, 1), evenly spread with one random shift, shuffled."""
    device = generator.device if generator is not None else None
    shift = torch.rand((), generator=generator, device=device)
    u = (torch.arange(batch, device=device) / batch + shift) % 1
    u = u[torch.randperm(batch, generator=generator, device=device)]
    if levels == "uniform":
        return u
    if levels != "bell":
        raise ValueError(f"noise levels must be 'uniform' or 'bell', not {levels!r}.")
    return torch.special.ndtri(u).sigmoid()


def _denoise(model: LoopMDM, tokens: Tensor, config: SamplerConfig, t: float,
             real: Tensor | None) -> tuple[Tensor, Tensor]:
    if config.exit_threshold is not None:
        return model.forward_adaptive(tokens, threshold=config.exit_threshold, max_loops=config.n_loops, t=t,
                                      attention_mask=real)
    n_loops = model.config.max_loops if config.n_loops is None else config.n_loops
    return model(tokens, n_loops, t=t, attention_mask=real), torch.full((len(tokens),), n_loops, device=tokens.device)


def _draw(logits: Tensor, mask: int, temperature: float,
          generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token per position, never the mask, and its probability under the untempered prediction."""
    logits = logits.float().index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)
    probabilities = logits.softmax(-1)
    if temperature == 0:
        predicted = probabilities.argmax(-1)
    else:
        tempered = (logits / temperature).softmax(-1).flatten(0, 1)
        predicted = torch.multinomial(tempered, 1, generator=generator).view(logits.shape[:2])
    return predicted, probabilities.gather(-1, predicted[..., None])[..., 0]


def _chosen(masked: Tensor, probability: Tensor, share: float, order: str,
            generator: torch.Generator | None) -> Tensor:
    if share >= 1:
        return masked
    if order == "ancestral":
        draws = torch.rand(masked.shape, generator=generator, device=generator.device if generator else None)
        return masked & (draws.to(masked.device) < share)
    quota = torch.ceil(masked.sum(1) * share - 1e-6).long()
    rank = probability.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & (rank < quota[:, None])
