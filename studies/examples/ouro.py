"""Ouro, loop by loop: what would each pass have predicted, and how ready was the exit gate?

    python studies/examples/ouro.py                              # a small stand-in with random weights
    python studies/examples/ouro.py ByteDance/Ouro-1.4B          # the release: a folder or a hub id; runs its code
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch
import tyro

from hooks.foreign.watching import watch
from hooks.location import located

Source = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]", help="a folder or a hub id")]


def main(source: Source = None) -> None:
    if source is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(located(source), trust_remote_code=True).eval()
    else:
        from studies.examples.architectures import OuroLike

        torch.manual_seed(0)
        model = OuroLike(total_ut_steps=4).eval()

    tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watch(model, ["model.norm.hook_out", "model.early_exit_gate.hook_out"]) as rec:
        model(tokens)
        states = rec.stack("model.norm.hook_out")                          # [loop, batch, pos, d_model]
        predicted = model.lm_head(states).argmax(-1)[:, 0]                 # [loop, pos]
        gate = rec.stack("model.early_exit_gate.hook_out").sigmoid().mean((1, 2, 3))
    for loop, row in enumerate(predicted):
        same = (row == predicted[-1]).float().mean()
        print(f"loop {loop}: {same:4.0%} of tokens as in the last loop, exit gate {gate[loop]:.2f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
