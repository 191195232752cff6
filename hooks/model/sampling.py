"""Recordings along the denoising steps: (step, loop, layer), streamed so that memory does not grow.

The sampler of `hooks.model.diffusion` runs the model once per denoising step; `record_sampling` hands the
recording of each step to a callback, and forgets it before the next. Reduce it there, keep
it, or append it to a file (`hooks.store`).

    def look(step, rec):                                # a DenoisingStep and a Recording
        norms.append(rec.stack("blocks.2.hook_resid_post"))
    record_sampling(model, prompt, SamplerConfig(n_steps=16), look, names_filter="blocks.*.hook_resid_post",
                    reduce=Norm(), only="masked")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hooks.contract import HookList
from hooks.model.diffusion import DenoisingStep, SamplerConfig, hooks_by_step, sample
from hooks.model.hooked import HookedLoopMDM
from hooks.model.inputs import AttentionMask, Tokens, real_positions, take
from hooks.recording import Cut, Recorder, Recording, Reducer, chooser, positions
from hooks.sites import SitePattern


def record_sampling(model: HookedLoopMDM, tokens: Tokens, config: SamplerConfig,
                    on_step: Callable[[DenoisingStep, Recording], None], *, names_filter: SitePattern,
                    generator: torch.Generator | None = None, reduce: Reducer | None = None,
                    pos_slice: Cut | None = None, batch_slice: Cut | None = None,
                    only: Literal["masked", "visible"] | None = None, dtype: torch.dtype | None = None,
                    device: torch.device | str | None = None, fwd_hooks: HookList = (),
                    attention_mask: AttentionMask = None) -> list[DenoisingStep]:
    """`hooks.model.diffusion.sample`, with ``on_step(step, recording)`` after each denoising step; returns the trace.

    The options are those of ``run_with_cache`` and of ``sample``; ``only`` follows the masks as they are at the
    beginning of each step. With adaptive looping a recording has the loops that the slowest example of its step ran.
    Hooks and edits that are in force, and ``fwd_hooks``, take part: a recording shows what they made of an activation.
    Raises SiteError before the first step for sites that cannot fire, and for edits of a step that never comes.
    """
    if only is not None and pos_slice is not None:
        raise ValueError("pos_slice and only both choose positions: give one of them.")
    tokens, attention_mask = take(tokens, attention_mask)
    real = real_positions(tokens, attention_mask)

    def chosen(now: Tensor) -> slice | Tensor | None:
        return chooser(pos_slice) if only is None else positions(now, model.config.mask_token_id, only, real=real)

    recorder = Recorder(reduce=reduce, pos=chosen(tokens), batch=batch_slice, dtype=dtype, device=device)
    with model.exclusive():
        looped: dict[str, bool] = {}
        for block in hooks_by_step(model, fwd_hooks, config):
            with block():
                sites = model.site_space(config.n_loops).resolve(names_filter)
                looped |= {site.name: bool(site.loop) for site in sites}

        def finished(step: DenoisingStep) -> None:
            ran = model.clock.ran
            names = {name: (("", ran),) if loops else () for name, loops in looped.items()}
            on_step(step, recorder.recording(names, model.config.topology(ran)))
            recorder.pos = chosen(step.after)

        return sample(model, tokens, config, generator=generator, on_step=finished, attention_mask=real,
                      fwd_hooks=[*fwd_hooks, (names_filter, recorder)])
