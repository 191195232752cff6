"""What a recording holds is what was there when the hook fired, whoever writes to what afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooks import watch
from hooks.recording import copied
from tests.small import small_model, small_tokens

POST = "blocks.2.hook_resid_post"

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.add_(1),
    "through a view": lambda x: x.view(-1)[2:].mul_(5),
    "by index": lambda x: x.__setitem__(0, -7.0),
    "as the output": lambda x: torch.mul(x.clone(), 3, out=x),
    "through numpy": lambda x: x.numpy().fill(9),
    "into shared memory": lambda x: x.share_memory_().zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("side", ["original", "copy"])
def test_a_write_to_one_leaves_the_other(write: Callable[[Tensor], Any], side: str) -> None:
    original = torch.arange(12.0).view(3, 4)
    before = original.clone()
    copy = copied(original)
    written, other = (original, copy) if side == "original" else (copy, original)
    write(written)
    assert not torch.equal(written, before), "the write arrived"
    assert torch.equal(other, before)


def test_memory_is_shared_until_then() -> None:
    original = torch.arange(12.0)
    copy = copied(original)
    assert torch._C._is_cow_tensor(copy)
    assert torch._C._data_address(copy) == torch._C._data_address(original)
    assert torch.equal(copy * 2, original * 2)
    assert torch._C._is_cow_tensor(copy), "reading copies nothing"
    copy.add_(1)
    assert torch._C._data_address(copy) != torch._C._data_address(original)


def test_a_view_does_not_keep_the_rest_alive() -> None:
    large = torch.arange(3000.0).view(3, 1000)
    copy = copied(large[1])
    assert copy.untyped_storage().nbytes() == 4000
    assert torch.equal(copy, large[1])


def test_where_torch_cannot_copy_lazily() -> None:
    foreign = np.ones(4, dtype=np.float32)
    held = copied(torch.from_numpy(foreign))
    foreign[:] = 2
    assert held.tolist() == [1, 1, 1, 1]
    assert torch.equal(torch.func.vmap(lambda x: copied(x) + x)(torch.ones(3, 2)), 2 * torch.ones(3, 2))
    compiled = torch.compile(lambda x: copied(x) + x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), 2 * torch.ones(3))
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(copied(sparse).to_dense(), torch.eye(3))
    with torch.inference_mode():
        inside = torch.ones(3)
        copy = copied(inside)
        inside.zero_()
    assert copy.tolist() == [1, 1, 1]


def test_a_copy_is_outside_the_graph_and_leaves_the_graph_alone() -> None:
    x = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x * x
    copy = copied(y)
    assert not copy.requires_grad
    copy.zero_()
    (y * y).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3)


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
