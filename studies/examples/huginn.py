"""Huginn, loop by loop: does the latent state settle, from the same random start each time?

    python studies/examples/huginn.py                                  # a small stand-in with random weights
    python studies/examples/huginn.py tomg-group-umd/huginn-0125       # the release; runs its code
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch

from hooks.foreign.schedules import huginn
from hooks.foreign.watching import watch

N_STEPS = 16
if len(sys.argv) > 1:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    steps: int | torch.Tensor = torch.tensor(N_STEPS)  # the release takes a tensor
else:
    from studies.examples.architectures import HuginnLike

    torch.manual_seed(0)
    model, steps = HuginnLike().eval(), N_STEPS

tokens = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
last = f"transformer.core_block.{len(model.transformer['core_block']) - 1}.hook_out"
with torch.no_grad(), watch(model, last, schedule=huginn(N_STEPS), seed=0) as rec:
    model(tokens, num_steps=steps)
states = rec.stack(last).float()                                            # [loop, batch, pos, d_model]
change = (states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1)
distance = (states - states[-1]).norm(dim=-1) / states[-1].norm(dim=-1)
for loop in range(1, N_STEPS):
    print(f"loop {loop:2}: relative step {change[loop - 1].mean():.4f}, "
          f"from the last state {distance[loop].mean():.4f}")
