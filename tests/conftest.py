"""Options of the whole suite: what a machine may lack can be taken away on one that has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from studies import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-bf16", action="store_true", help="run as on a CPU without bfloat16 instructions")


@pytest.fixture(autouse=True, scope="session")
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--no-bf16"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "has_bf16", lambda device: False)
        yield
