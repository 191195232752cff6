"""Options of the whole suite: what a machine may lack can be taken away on one that has it, and so can the checks.

Every run checks annotations at run time (``--jaxtyping-packages`` in pyproject.toml). A test that gives a wrong type on
purpose, to see the library's own refusal, is marked ``unchecked``.
"""

from __future__ import annotations

from collections.abc import Iterator

import beartype
import jaxtyping
import pytest

# Before anything of ours is imported, and so checked: an int is a float (PEP 484). To beartype that is an option, which
# jaxtyping's cannot carry.
beartype.beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-bf16", action="store_true", help="run as on a CPU without bfloat16 instructions")


@pytest.fixture(autouse=True, scope="session")
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--no-bf16"):
        yield
        return
    from studies.training import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "has_bf16", lambda device: False)
        yield


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("unchecked") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield
