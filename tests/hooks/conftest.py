"""What several tests of hooks start from: a small model, tokens for it, and no gradients where none are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from tests.small import small_model, small_tokens


@pytest.fixture
def model() -> HookedLoopMDM:
    return small_model()


@pytest.fixture
def tokens() -> Tensor:
    return small_tokens()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
