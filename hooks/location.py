"""Where a model is: a folder on this machine, or an id on the hub.

Everything that loads a model by name asks here first, so that a folder that is not there is an error at once, and
not a search on the hub for a model that happens to have the same form of name.

    located("zoo/automaton-loop")        # "zoo/automaton-loop": there is such a folder
    located("albert/albert-base-v2")     # as it is: a hub id, unless there is a folder "albert" here
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def located(name: str | Path) -> str:
    """``name`` as loaders take it: the path of a folder that exists (``~`` expanded), or a hub id as it is.

    A hub id is a string of the form owner/name, where no folder called owner is here. Anything else is a path. Raises
    FileNotFoundError for a path that leads nowhere, NotADirectoryError for a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise NotADirectoryError(f"{name} is a file: give the folder that holds it, with config.json and "
                                 "model.safetensors.")
    owner = path.parent
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not owner.is_dir():
        return name
    raise FileNotFoundError(f"there is no folder {path} in {Path.cwd()}{_hint(path)}. " + (
        f"To fetch {name} from the hub, start in a folder without a folder {owner}."
        if isinstance(name, str) and _HUB_ID.fullmatch(name) else
        "A model is a folder, or a hub id of the form owner/name."))


def _hint(path: Path) -> str:
    """The nearest names of folders beside ``path``, or the part of it that is missing."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    there = [folder.name for folder in sorted(path.parent.iterdir()) if folder.is_dir()]
    near = difflib.get_close_matches(path.name, there, n=3)
    return f" (near it: {', '.join(str(path.parent / name) for name in near)})" if near else ""


__all__ = ["located"]
