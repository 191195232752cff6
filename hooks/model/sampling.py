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
from jaxtyping import Int
from torch import Tensor

from hooks.model.diffusion import DenoisingStep, SamplerConfig, sample
from hooks.model.hooked import HookedLoopMDM
from hooks.recording import Cut, Recorder, Recording, Reducer, positions
from hooks.sites import SitePattern


def record_sampling(model: HookedLoopMDM, tokens: Int[Tensor, "batch pos"], config: SamplerConfig,
                    on_step: Callable[[DenoisingStep, Recording], None], *, names_filter: SitePattern,
                    generator: torch.Generator | None = None, reduce: Reducer | None = None,
                    pos_slice: Cut | None = None, batch_slice: Cut | None = None,
                    only: Literal["masked", "visible"] | None = None, dtype: torch.dtype | None = None,
                    device: torch.device | str | None = None) -> list[DenoisingStep]:
    """`hooks.model.diffusion.sample`, with ``on_step(step, recording)`` after each denoising step; returns the trace.

    The options are those of ``run_with_cache``; ``only`` follows the masks as they are at the beginning of each
    step. With adaptive looping a recording has the loops that the slowest example of its step ran. Hooks and
    edits that are in force take part. Raises SiteError before the first step for sites that cannot fire.
    """
    if only is not None and pos_slice is not None:
        raise ValueError("pos_slice and only both choose positions: give one of them.")

    def chosen(now: Tensor) -> Cut | None:
        return pos_slice if only is None else positions(now, model.config.mask_token_id, only)

    recorder = Recorder(reduce=reduce, pos=chosen(tokens), batch=batch_slice, dtype=dtype, device=device)
    with model.exclusive():
        sites = model.site_space(config.n_loops).resolve(names_filter)
        looped = {site.name: bool(site.loop) for site in sites}

        def finished(step: DenoisingStep) -> None:
            ran = model.clock.ran
            names = {name: (("", ran),) if loops else () for name, loops in looped.items()}
            on_step(step, recorder.recording(names, model.config.topology(ran)))
            recorder.pos = chosen(step.after)

        with model.hooks([([str(site) for site in sites], recorder)], n_loops=config.n_loops):
            return sample(model, tokens, config, generator=generator, on_step=finished)
