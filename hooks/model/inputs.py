"""What a LoopMDM takes: tokens [batch, pos], and a padding mask where sequences of different lengths share a batch.

The mask is transformers' ``attention_mask``: 1 at real positions, 0 at padding. It is given by name, or with the
tokens as tokenizers return them, in a mapping of ``input_ids`` and ``attention_mask``. Everything that takes tokens
takes them through here, so that a list or an array is refused alike everywhere.

    logits = model(tokens, 8, attention_mask=lengths[:, None] > torch.arange(tokens.shape[1]))
    logits = model({"input_ids": tokens, "attention_mask": mask}, 8)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AttentionMask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos"] | None
"""1 at real positions and 0 at padding, or None where all are real."""

Tokens = Int[Tensor, "batch pos"] | Mapping[str, Any]
"""Token ids, or a mapping of ``input_ids`` and ``attention_mask``."""

NAMES = ("input_ids", "attention_mask")


def take(inputs: Any, attention_mask: AttentionMask = None) -> tuple[Tensor, Tensor | None]:
    """The tokens and the mask as they were given. Raises TypeError for tokens that are no tensor, ValueError for a
    mapping of other things, or with a second mask."""
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs or set(inputs) - set(NAMES):
            raise ValueError(f"a LoopMDM takes a mapping of input_ids and, with padding, attention_mask, not of "
                             f"{', '.join(map(str, inputs)) or 'nothing'}: leave out the rest.")
        if attention_mask is not None and "attention_mask" in inputs:
            raise ValueError("attention_mask was given twice, with the tokens and by name: give it once.")
        inputs, attention_mask = inputs["input_ids"], inputs.get("attention_mask", attention_mask)
    return as_given(inputs), attention_mask


def as_given(tokens: Any) -> Tensor:
    """``tokens``, if they are a tensor; else TypeError."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor [batch, pos], not a {type(tokens).__name__}: "
                        "torch.as_tensor(tokens) makes one.")
    return tokens


def real_positions(tokens: Int[Tensor, "batch pos"], attention_mask: AttentionMask) -> Bool[Tensor, "batch pos"] | None:
    """Where ``attention_mask`` has ones, or None if that is everywhere.

    Raises TypeError for a mask that is no tensor, ValueError for another shape, other values than 0 and 1, an example
    without a real position, and padding in the middle of an example.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [batch, pos], not a {type(attention_mask).__name__}: "
                        "torch.as_tensor(attention_mask) makes one.")
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask must be [batch, pos] like the tokens, {list(tokens.shape)}, not "
                         f"{list(attention_mask.shape)}.")
    real = attention_mask.to(tokens.device) != 0
    if torch.compiler.is_compiling():
        return real
    if attention_mask.dtype is not torch.bool and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError("attention_mask must hold 1 (real) and 0 (padding) alone; an additive mask is made from it "
                         "inside the model.")
    if bool(real.all()):
        return None
    if bool((empty := ~real.any(1)).any()):
        raise ValueError(f"example {int(empty.nonzero()[0])} is padding alone: leave it out of the batch.")
    begins = real.int().diff(dim=1, prepend=torch.zeros_like(real[:, :1]).int()) == 1
    if bool((parted := begins.sum(1) > 1).any()):
        raise ValueError(f"example {int(parted.nonzero()[0])} has padding in its middle: pad before or after the "
                         "tokens. To hide a token that has a place in the sequence, edit attention instead "
                         "(a hook on attn.hook_attn_scores).")
    return real


def masked_in(inputs: Any, mask_token_id: int, attention_mask: AttentionMask = None) -> Bool[Tensor, "batch pos"]:
    """Real positions that hold the mask token."""
    tokens, attention_mask = take(inputs, attention_mask)
    real = real_positions(tokens, attention_mask)
    masked = tokens == mask_token_id
    return masked if real is None else masked & real
