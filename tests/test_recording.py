"""What a recording holds: the model's own tensors where nothing can write into them, copies elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import small_model, small_tokens


def test_a_recording_holds_the_tensors_themselves_unless_asked_to_copy() -> None:
    model, tokens = small_model(), small_tokens()
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.attn.hook_q"]
    with torch.no_grad():
        _, held = model.run_with_cache(tokens, n_loops=2, names_filter=names)
        _, copied = model.run_with_cache(tokens, n_loops=2, names_filter=names, copy=True)
    assert all(torch.equal(held[site], copied[site]) for site in copied)
    one, same = "blocks.1.hook_resid_post@0", "blocks.2.hook_resid_pre@0"
    assert held[one].data_ptr() == held[same].data_ptr(), "one tensor, seen at two sites"
    assert copied[one].data_ptr() != copied[same].data_ptr()
    for site, value in held.items():
        assert value.untyped_storage().nbytes() == value.nbytes, f"{site} keeps more alive than itself"


@pytest.mark.parametrize("how", ["hooks", "add_hook"])
def test_a_hook_that_writes_in_place_does_not_reach_what_was_recorded(how: str) -> None:
    model, tokens = small_model(), small_tokens()
    site, later = "blocks.1.hook_resid_post@1", "blocks.2.hook_resid_pre@1"   # the same tensor

    def in_place(activation: Tensor, *, hook: Any) -> Tensor:
        return activation.zero_()

    with torch.no_grad():
        _, clean = model.run_with_cache(tokens, n_loops=2, names_filter=site)
        if how == "hooks":
            with model.hooks([(later, in_place)], n_loops=2):
                _, rec = model.run_with_cache(tokens, n_loops=2, names_filter=site)
        else:
            detach = model.add_hook(later, in_place, n_loops=2)
            _, rec = model.run_with_cache(tokens, n_loops=2, names_filter=site)
            detach()
    assert clean[site].abs().sum() > 0
    assert torch.equal(rec[site], clean[site])
