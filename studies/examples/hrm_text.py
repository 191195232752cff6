"""HRM-Text, cycle by cycle: how far do the fast (L) and the slow (H) stack move in each of their nested loops?

    python studies/examples/hrm_text.py                    # transformers' own class, small, random weights
    python studies/examples/hrm_text.py <folder or hub id>
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch
import tyro
from transformers import HrmTextConfig, HrmTextForCausalLM

from hooks.foreign.watching import watch
from hooks.location import located

Source = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]", help="a folder or a hub id")]


def main(source: Source = None) -> None:
    if source is not None:
        model = HrmTextForCausalLM.from_pretrained(located(source)).eval()
    else:
        torch.manual_seed(0)
        model = HrmTextForCausalLM(HrmTextConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_layers_per_stack=2, num_attention_heads=2,
            head_dim=16, H_cycles=2, L_cycles=3, max_position_embeddings=64, initializer_range=0.2)).eval()

    tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watch(model, "model.[LH]_module.*") as rec:
        model(tokens)
    before = torch.zeros(())
    for h in range(model.config.H_cycles):
        for low in range(model.config.L_cycles):
            state = rec[f"model.L_module.hook_out@h{h}.l{low}"]
            if (h, low) != (0, 0):
                print(f"h{h}.l{low}: L state moved by {(state - before).norm() / before.norm():.3f} of its length")
            before = state
        given, made = rec[f"model.H_module.hook_in@h{h}"], rec[f"model.H_module.hook_out@h{h}"]
        cosine = torch.nn.functional.cosine_similarity(given, made, dim=-1).mean()
        print(f"h{h}:    H state to the cosine of {cosine:.3f} with what the H stack was given")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
