"""Files and folders that appear whole or not at all: written beside their place, then renamed into it.

    with written_whole("results/claims.md") as temporary:
        temporary.write_text(text)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path in the folder of ``path``, which is made if need be; what the block writes there becomes ``path``.

    It may be a file or a folder, and takes the place of what was there. If the block raises, ``path`` stays as it
    was and nothing else is left. A process that is killed leaves ``.<name>.tmp``, which the next one clears away.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp")
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        yield temporary
        if final.is_dir() or temporary.is_dir():   # a rename replaces a file by a file, and nothing else
            _remove(final)
        os.replace(temporary, final)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
