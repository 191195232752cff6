"""Masked diffusion: corrupting, the training bound, and sampling by unmasking.

The scaffolding of MDLM (2406.07524) with the schedule α_t = 1 − t: a token is masked with
probability t, the bound weighs the cross-entropy of masked positions by 1/t, and sampling
reveals masked positions over a number of denoising steps. Only **free** positions are ever
masked; given ones (a puzzle's clues) stay visible and carry no loss.

    noised = corrupt(tokens, t, mask_token_id, free=free, generator=generator)
    loss = nelbo(model(noised, n_loops), tokens, noised, t, mask_token_id, free=free)
    trace = sample(model, prompt, SamplerConfig(n_steps=8, order="confidence"), generator=generator)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks.model.loopmdm import LoopMDM

T_MIN = 1e-3
"""Smallest noise level drawn in training; it bounds the weight 1/t."""


def antithetic_t(batch: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "batch"]:
    """Noise levels spread evenly over (0, 1] with one random shift (low-discrepancy, 2107.00630), shuffled."""
    device = generator.device if generator is not None else None
    shift = torch.rand((), generator=generator, device=device)
    t = (torch.arange(batch, device=device) / batch + shift) % 1
    t = t[torch.randperm(batch, generator=generator, device=device)]
    return T_MIN + (1 - T_MIN) * t


def corrupt(tokens: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"] | float, mask_token_id: int, *,
            free: Bool[Tensor, "batch pos"] | None = None,
            generator: torch.Generator | None = None) -> Int[Tensor, "batch pos"]:
    """Replace each free token by the mask with probability ``t``, independently."""
    level = torch.as_tensor(t, device=tokens.device).expand(len(tokens))[:, None]
    device = generator.device if generator is not None else tokens.device
    hit = torch.rand(tokens.shape, generator=generator, device=device).to(tokens.device) < level
    if free is not None:
        hit = hit & free
    return tokens.masked_fill(hit, mask_token_id)


def nelbo(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"],
          noised: Int[Tensor, "batch pos"], t: Float[Tensor, "batch"], mask_token_id: int, *,
          free: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, ""]:
    """The negative ELBO of 2406.07524 in nats per free token: E Σ_masked (1/t) · −log p(x0) / #free."""
    masked = noised == mask_token_id
    nll = F.cross_entropy(logits[masked].float(), tokens[masked], reduction="none")
    weight = (1 / t)[:, None].expand(tokens.shape)[masked]
    n_free = tokens.numel() if free is None else int(free.sum())
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
def sample(model: LoopMDM, tokens: Int[Tensor, "batch pos"], config: SamplerConfig, *,
           generator: torch.Generator | None = None,
           on_step: Callable[[DenoisingStep], None] | None = None) -> list[DenoisingStep]:
    """Unmask every masked position of ``tokens``; returns the trace, one entry per step.

    *ancestral* reveals each masked position with probability (t − s)/t in the step t → s; *confidence*
    reveals the share (t − s)/t of them (rounded up) whose drawn token is most probable. Revealed tokens
    never change. ``on_step`` sees each step as it ends. The samples are ``trace[-1].after``.
    """
    mask = model.config.mask_token_id
    trace = []
    for step in range(config.n_steps):
        t, s = 1 - step / config.n_steps, 1 - (step + 1) / config.n_steps
        masked = tokens == mask
        logits, loops_used = _denoise(model, tokens, config, t)
        predicted, probability = _draw(logits, mask, config.temperature, generator)
        reveal = _chosen(masked, probability, 1 - s / t, config.order, generator)
        after = torch.where(reveal, predicted, tokens)
        trace.append(DenoisingStep(step, t, tokens, after, predicted, probability, loops_used))
        if on_step is not None:
            on_step(trace[-1])
        tokens = after
    return trace


def _denoise(model: LoopMDM, tokens: Tensor, config: SamplerConfig, t: float) -> tuple[Tensor, Tensor]:
    if config.exit_threshold is not None:
        return model.forward_adaptive(tokens, threshold=config.exit_threshold, max_loops=config.n_loops, t=t)
    n_loops = model.config.max_loops if config.n_loops is None else config.n_loops
    return model(tokens, n_loops, t=t), torch.full((len(tokens),), n_loops, device=tokens.device)


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
