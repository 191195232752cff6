"""loopify: loop a contiguous block of a pretrained model's layers, without training (2605.23872).

The layers, their weights, their names and the model's code stay as they are; the block is run again on its
own output, each layer with the masks and positions that the model itself gave it. Undone by ``remove``, or at
the end of a ``with`` block. `hooks.foreign.watching` knows a loopified model's loops by itself.

    with loopify(model, layers=(10, 14), n_loops=3):            # layers 10 to 14, both included
        with watch(model, "model.layers.*.hook_out") as rec:
            model(tokens)
    rec["model.layers.12.hook_out@-1"]

With n_loops=1 nothing is touched: outputs are bit-identical. Generation with a dynamic KV cache works: each
loop keeps its keys and values in slots of its own, behind those of the model's layers.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import Tensor, nn

from hooks.foreign import payload
from hooks.foreign.schedules import LOOPIFIED, Schedule


def loopify(model: nn.Module, layers: tuple[int, int], n_loops: int, *, stack: str | None = None) -> Loops:
    """Run ``layers`` = (first, last), 0-based and both included, ``n_loops`` times in every forward from now on.

    Works on Hugging Face decoders and encoders, and on any model with a ModuleList of layers that pass a hidden
    state on. ``stack`` is the path of that list, found by itself where there is only one of
    ``config.num_hidden_layers``. The result is a context manager; its ``remove()`` undoes the looping.
    Raises ValueError for layers or a stack that do not exist, and for a model that is looped already.
    """
    if model in LOOPIFIED:
        raise ValueError("the model is loopified already: call remove() of the earlier loopify, or leave its block.")
    if not isinstance(n_loops, int) or isinstance(n_loops, bool) or n_loops < 1:
        raise ValueError(f"n_loops must be a whole number of at least 1, not {n_loops!r}.")
    path, found = _stack_of(model, stack)
    first, last = layers
    if not 0 <= first <= last < len(found):
        raise ValueError(f"layers=({first}, {last}) is not a block of {path}, whose layers are 0..{len(found) - 1}; "
                         "give the first and the last of those to loop.")
    return Loops(model, path, list(found)[first:last + 1], first, n_loops, len(found))


class Loops:
    """A model being looped, with its ``n_loops``, its ``schedule`` for watch, and ``remove`` to undo it."""

    def __init__(self, model: nn.Module, path: str, block: list[nn.Module], first: int, n_loops: int, n_layers: int):
        self.model, self.path, self.block, self.first, self.n_layers = model, path, block, first, n_layers
        self._n_loops = n_loops
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(block)
        self._again = False
        self._removers = [layer.register_forward_pre_hook(self._keeper(i), with_kwargs=True)
                          for i, layer in enumerate(block)]
        self._removers.append(block[-1].register_forward_hook(self._run_again))
        LOOPIFIED[model] = self

    @property
    def n_loops(self) -> int:
        return self._n_loops

    @property
    def schedule(self) -> Schedule:
        """What `hooks.foreign.watching` needs to know: each layer of the block runs ``n_loops`` times."""
        return Schedule({f"{self.path}.{self.first + i}": self._n_loops for i in range(len(self.block))})

    def remove(self) -> None:
        """The model as it was."""
        for remover in self._removers:
            remover.remove()
        LOOPIFIED.pop(self.model, None)

    def __enter__(self) -> Loops:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # ------------------------------------------------------------------ private

    def _keeper(self, index: int) -> Any:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._again and self._n_loops > 1:
                self._given[index] = args, kwargs
        return keep

    def _run_again(self, layer: nn.Module, _: Any, output: Any) -> Any:
        """After the block's own pass: the others, each layer with what the model gave it in that pass."""
        if self._again or self._n_loops == 1:
            return None
        self._again = True
        try:
            for loop in range(1, self._n_loops):
                for index, inner in enumerate(self.block):
                    args, kwargs = self._given[index]
                    where = payload.find(output)
                    if where is None:
                        raise TypeError(f"{type(inner).__name__} of {self.path} returned {type(output).__name__} "
                                        "without a tensor in it, so that it cannot be looped.")
                    args, kwargs = payload.with_state(args, kwargs, payload.get(output, where), inner)
                    output = inner(*(self._slots(a, loop) for a in args),
                                   **{name: self._slots(value, loop) for name, value in kwargs.items()})
        finally:
            self._again = False
            self._given = [((), {})] * len(self.block)
        return output

    def _slots(self, value: Any, loop: int) -> Any:
        """A KV cache as loop ``loop`` is to see it; anything else as it is."""
        if not (callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))):
            return value
        return CacheOfLoop(value, self.n_layers + (loop - 1) * len(self.block) - self.first)


class CacheOfLoop:
    """A transformers ``DynamicCache`` whose layer i is another one's slot i + ``offset``, made where it is missing.

    Slots live in the model's own cache, so that reordering for beams, cropping and batching reach every loop.
    """

    def __init__(self, cache: Any, offset: int):
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        if type(cache).__name__ != "DynamicCache" or not kinds <= {"DynamicLayer"}:
            shown = type(cache).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
            raise ValueError(f"loops cannot keep their keys and values in a {shown}: pass use_cache=False, or generate "
                             "with a DynamicCache of full attention.")
        self._cache, self._offset = cache, offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache, slot = self._cache, layer_idx + self._offset
        while len(cache.layers) <= slot:
            cache.layers.append(type(cache.layers[layer_idx])())
        return cache.update(keys, values, slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        slot = layer_idx + self._offset
        return self._cache.get_seq_length(slot) if slot < len(self._cache.layers) else 0


def _stack_of(model: nn.Module, stack: str | None) -> tuple[str, nn.ModuleList]:
    """The list of layers, and its path."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    if stack is not None:
        if stack not in lists:
            raise ValueError(f"the model has no ModuleList at {stack!r}; it has {', '.join(lists) or 'none'}.")
        return stack, lists[stack]
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    fitting = [path for path, part in lists.items() if depth in (None, len(part))]
    outermost = [path for path in fitting if not any(fnmatch.fnmatchcase(path, f"{other}.*") for other in fitting)]
    if len(outermost) != 1:
        raise ValueError(f"which layers? stack= should be one of: {', '.join(lists) or 'none found'}.")
    return outermost[0], lists[outermost[0]]
