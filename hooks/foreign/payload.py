"""The hidden state inside what a module takes and returns: a tensor, or a tensor within a tuple, list or dict.

Transformer layers return tuples and ``ModelOutput`` dicts, and take their hidden state by position or by
name. `hooks.foreign.watching` records and replaces one tensor there, found by these rules and put back into a
container of the same kind; everything else passes untouched.

    find((hidden, None))                  # (0,): where the tensor is
    get((hidden, None), (0,))             # hidden
    put((hidden, None), (0,), new)        # (new, None)
    element((hidden, (h, c)), "1.0")      # (1, 0), where h is: any other tensor is named by index or key
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Where = tuple[Any, ...]
"""Keys and indices that lead to the tensor, outermost first."""

FIRST = ("last_hidden_state", "hidden_states", "logits", "x", "input", "hidden_state", "inputs_embeds")
"""Names that are looked at before the others, in this order."""


def find(value: Any) -> Where | None:
    """Where the tensor is in ``value``: itself; else the first floating-point one, else the first of any type.

    Named parts are searched in the order of `FIRST`, then in their own. None if there is no tensor.
    """
    return _search(value, floating=True) or _search(value, floating=False) if not isinstance(value, Tensor) else ()


def element(value: Any, name: str) -> Where | None:
    """Where the tensor is that ``name`` spells out: indices, keys and field names, with dots between them.

    None if there is nothing of that name, or no tensor.
    """
    where: Where = ()
    for key in name.split("."):
        parts = dict(_named_parts(value))
        found = key if key in parts else int(key) if key.isdecimal() else key
        if found not in parts:
            return None
        if hasattr(value, "_fields") and found in value._fields:
            found = value._fields.index(found)
        value, where = get(value, (found,)), (*where, found)
    return where if isinstance(value, Tensor) else None


def tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in it, with the name of the element that it is; of a tensor itself, with none."""
    if isinstance(value, Tensor):
        return [("", value)]
    return [(f"{key}.{name}".rstrip("."), tensor) for key, part in _parts(value) for name, tensor in tensors(part)]


def get(value: Any, where: Where) -> Any:
    for key in where:
        value = getattr(value, key) if _is_plain_dataclass(value) else value[key]
    return value


def put(value: Any, where: Where, tensor: Tensor) -> Any:
    """``value`` with the tensor at ``where`` replaced; containers on the way are copied, not changed."""
    if not where:
        return tensor
    key = where[0]
    inner = put(get(value, (key,)), where[1:], tensor)
    if _is_plain_dataclass(value):
        return dataclasses.replace(value, **{key: inner})
    if isinstance(value, tuple):
        parts = [*value[:key], inner, *value[key + 1:]]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    changed = copy.copy(value)
    changed[key] = inner
    return changed


def with_state(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor,
               layer: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's own arguments with the state in them replaced. TypeError if they hold no tensor."""
    if (where := find(args)) is not None:
        return put(args, where, state), kwargs
    if (where := find(kwargs)) is not None:
        return args, put(kwargs, where, state)
    raise TypeError(f"{type(layer).__name__} was called without a tensor, so that it cannot be run on another state.")


class Replaying(threading.local):
    """Is this thread in a forward in which some layers are answered from a record (`hooks.foreign.replay`)?

    ``answer`` is what such a layer has just returned: hooks do not act on it.
    """

    on = False
    answer: Any = None


REPLAYING = Replaying()


# ------------------------------------------------------------------------ private


def _search(value: Any, floating: bool) -> Where | None:
    if isinstance(value, Tensor):
        return () if value.is_floating_point() or not floating else None
    for key, part in _parts(value):
        where = _search(part, floating)
        if where is not None:
            return (key, *where)
    return None


def _named_parts(value: Any) -> list[tuple[Any, Any]]:
    """`_parts`, where those of a named tuple go by both index and name."""
    named = list(zip(value._fields, value, strict=True)) if hasattr(value, "_fields") else []
    return [*_parts(value), *named]


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        named = dict(value)
    elif _is_plain_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, (tuple, list)):
        return list(enumerate(value))
    else:
        return []
    first = [name for name in FIRST if name in named]
    return [(name, named[name]) for name in (*first, *(name for name in named if name not in first))]


def _is_plain_dataclass(value: Any) -> bool:
    """A dataclass that is not also a mapping (transformers' ModelOutput is both)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (Mapping, type))
