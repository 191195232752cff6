"""Annotations are checked in every run of the suite: a wrong shape or type is an error where it is passed."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from hooks import LoopMDMConfig
from hooks.model.diffusion import SamplerConfig, nelbo
from hooks.model.layers import attend
from probes.intervals import Resampling
from probes.linear.solvers import ridge
from studies.tasks import Automaton, Batch
from tests.small import MASK, small_model, small_tokens

PACKAGES = ("hooks", "probes", "studies")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_imported_with_checks(package: str) -> None:
    root = importlib.import_module(package)
    names = [package, *(module.name for module in pkgutil.walk_packages(root.__path__, f"{package}."))]
    assert len(names) > 5
    for name in names:
        spec = find_spec(name)
        assert spec is not None
        if spec.origin is None:   # a folder without an __init__.py
            continue
        assert type(spec.loader).__module__.startswith("jaxtyping"), f"{name} is imported without checks"


TASK = Automaton(rule=90, width=5, rows=3)

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "axes that must be equal": (
        lambda: nelbo(torch.zeros(2, 5, 7), small_tokens(2, 4), small_tokens(2, 4), torch.ones(2), MASK), "tokens"),
    "an axis too few": (lambda: TASK.score(torch.zeros(15, dtype=torch.long), TASK.sample(1, seed=0)), "predicted"),
    "an axis too many": (lambda: TASK.regions() is TASK.decode(torch.zeros(1, 15, dtype=torch.long)), "tokens"),
    "whole numbers for floats": (
        lambda: ridge(torch.randn(1, 4, 2), torch.zeros(4, 1, dtype=torch.long)), "y"),
    "an array for a tensor": (lambda: attend(*(np.zeros((1, 1, 2, 4), dtype=np.float32),) * 3), "q"),  # type: ignore
    "a tensor for an array": (lambda: Resampling((3,)).mean(torch.zeros(3, 2)), "values"),
    "a method of a model": (lambda: small_model().begin(small_tokens()[0]), "tokens"),
    "a field of a dataclass": (lambda: Batch(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool)), "tokens"),
    "a word that is none of those allowed": (lambda: SamplerConfig(order="left"), "order"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_its_annotation_is_an_error(name: str) -> None:
    call, parameter = WRONG[name]
    with pytest.raises(TypeCheckError, match=f"parameter '{parameter}'"):
        call()


def test_what_is_returned_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(model, "loop", lambda x, *_, **__: x[:, :-1])
    with pytest.raises(TypeCheckError, match=r"return value of hooks\.model\.loopmdm\.LoopMDM\.forward"):
        model(small_tokens())


@pytest.mark.unchecked
def test_a_test_of_a_refusal_sees_the_refusal() -> None:
    with pytest.raises(ValueError, match="order must be 'ancestral' or 'confidence', not 'left'"):
        SamplerConfig(order="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position must be one of rotary, learned, both"):
        LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=4, position="none")  # type: ignore[arg-type]


def test_and_the_next_one_is_checked_again() -> None:
    with pytest.raises(TypeCheckError):
        SamplerConfig(order="left")  # type: ignore[arg-type]
