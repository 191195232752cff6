"""What a recording holds is what was there when the hook fired, whoever writes to what afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hooks import watch
from tests.small import small_model, small_tokens

POST = "blocks.2.hook_resid_post"


@torch.no_grad()
def test_a_later_hook_that_writes_in_place_does_not_change_what_was_recorded() -> None:
    model, tokens = small_model(), small_tokens()
    clean = model.run_with_cache(tokens, 3, names_filter=POST)[1].stack(POST)

    def spoil(x: Tensor, /, *, hook: Any) -> None:
        x.zero_()

    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_pre", spoil)], n_loops=3):  # the last loop's state itself
        spoilt = model.run_with_cache(tokens, 3, names_filter=POST)[1].stack(POST)
    assert torch.equal(spoilt, clean)


@torch.no_grad()
def test_a_module_that_works_in_place_is_recorded_as_it_went() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = Add()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.add(x)
            return x

    model = Loop()
    with watch(model, "add.hook_out", schedule={"add": 4}) as rec:
        model(torch.zeros(3))
    assert rec.stack("add.hook_out")[:, 0].tolist() == [1, 2, 3, 4]
