"""The recording that a watch hands out: what the last forward that finished left, and an error before there is one.

    watched = Watched()
    watched.take(rec)                                        # a Recording: what a forward left, and reads the same
"""

from __future__ import annotations

from torch import Tensor

from hooks.recording import Recording
from hooks.sites import SiteError


class Watched(Recording):
    """The recording of a watch: holds the last forward that finished, and nothing before it or after a failed one."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.filled = False

    def __getitem__(self, site: str) -> Tensor:
        self._refuse_empty()
        return super().__getitem__(site)

    def stack(self, name: str) -> Tensor:
        self._refuse_empty()
        return super().stack(name)

    def take(self, other: Recording | None) -> None:
        """Hold what ``other`` holds, or nothing."""
        self.__dict__.update((Recording({}, {}) if other is None else other).__dict__, filled=other is not None)

    def _refuse_empty(self) -> None:
        if not self.filled:
            raise SiteError("nothing is recorded: no forward of the watched module has finished since the block began, "
                            "or since one that failed.")
