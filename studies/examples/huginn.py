"""Huginn, loop by loop: does the latent state settle, from the same random start each time?

    python studies/examples/huginn.py                                  # a small stand-in with random weights
    python studies/examples/huginn.py tomg-group-umd/huginn-0125       # the release; runs its code
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch
import tyro

from hooks.foreign.schedules import huginn
from hooks.foreign.watching import watch
from hooks.location import located

N_STEPS = 16
Source = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]", help="a folder or a hub id")]


def main(source: Source = None) -> None:
    if source is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(located(source), trust_remote_code=True).eval()
    else:
        from studies.examples.architectures import HuginnLike

        torch.manual_seed(0)
        model = HuginnLike().eval()

    tokens = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    last = f"transformer.core_block.{len(model.transformer['core_block']) - 1}.hook_out"
    with torch.no_grad(), watch(model, last, schedule=huginn(N_STEPS), seed=0) as rec:
        model(tokens, num_steps=N_STEPS)    # a whole number: the release takes the length of a tensor, which has none
    states = rec.stack(last).float()                                        # [loop, batch, pos, d_model]
    change = (states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1)
    distance = (states - states[-1]).norm(dim=-1) / states[-1].norm(dim=-1)
    for loop in range(1, N_STEPS):
        print(f"loop {loop:2}: relative step {change[loop - 1].mean():.4f}, "
              f"from the last state {distance[loop].mean():.4f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
