"""ALBERT, loop by loop: one layer group applied n times. Which loop settles the masked words?

    python studies/examples/albert.py                          # transformers' own class, small, random weights
    python studies/examples/albert.py albert/albert-base-v2    # a folder or a hub id
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import torch
import tyro
from transformers import AlbertConfig, AlbertForMaskedLM

from hooks.foreign.watching import watch
from hooks.location import located

Source = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]", help="a folder or a hub id")]


def main(source: Source = None) -> None:
    if source is not None:
        model = AlbertForMaskedLM.from_pretrained(located(source)).eval()
    else:
        torch.manual_seed(0)
        model = AlbertForMaskedLM(AlbertConfig(
            vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=6, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.2)).eval()

    tokens = torch.randint(5, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    site = "albert.encoder.albert_layer_groups.0.hook_out"
    with torch.no_grad(), watch(model, site) as rec:
        final = model(tokens).logits.argmax(-1)
        for loop, state in enumerate(rec.stack(site)):                       # logit lens: the head on every loop
            same = (model.predictions(state).argmax(-1) == final).float().mean()
            print(f"loop {loop}: {same:4.0%} of tokens as in the end")
        half = rec.space.names[site][0][1] // 2
    edit = (f"{site}@{half}", lambda state, hook: torch.zeros_like(state))
    with torch.no_grad(), watch(model, (), fwd_hooks=[edit]):
        same = (model(tokens).logits.argmax(-1) == final).float().mean()
    print(f"with the state zeroed after loop {half}: {same:4.0%}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
