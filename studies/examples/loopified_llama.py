"""A pretrained Llama-architecture model, its middle layers looped without training (2605.23872), loop by loop.

    python studies/examples/loopified_llama.py                               # small, random weights
    python studies/examples/loopified_llama.py HuggingFaceTB/SmolLM2-135M    # a folder or a hub id
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch
import tyro
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hooks.foreign.loopify import loopify
from hooks.foreign.watching import watch
from hooks.location import located

Source = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]", help="a folder or a hub id")]


def main(source: Source = None) -> None:
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(located(source)).eval()
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
            max_position_embeddings=64)).eval()

    tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    first, last = model.config.num_hidden_layers // 3, model.config.num_hidden_layers // 2
    site = f"model.layers.{last}.hook_out"
    with torch.no_grad():
        plain = model(tokens).logits.log_softmax(-1)
        for n_loops in (1, 2, 4):
            with loopify(model, layers=(first, last), n_loops=n_loops), watch(model, site) as rec:
                looped = model(tokens).logits.log_softmax(-1)
            kl = (plain.exp() * (plain - looped)).sum(-1).mean()
            moved = rec[f"{site}@-1"] - rec[f"{site}@0"]
            print(f"layers {first} to {last}, {n_loops} loops: KL from the original {kl:.4f}, "
                  f"state moved by {moved.norm() / rec[f'{site}@0'].norm():.3f} of its length")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
