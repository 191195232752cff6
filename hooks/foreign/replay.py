"""Runs of a foreign model that begin at any layer: its own code, with the layers before answered from a record.

Code of the model that stands between its layers (a norm after each loop, an adapter, injected input, masks) runs as
the model wrote it. `record` runs the module once and keeps what each layer returned; `Trace.replay` runs it again, and
each layer before ``start`` returns what it returned then, the last of them the given state, so that only the
layers from ``start`` on are computed. The run ends as soon as layer ``stop`` has returned.

    trace = record(call, layers, layout_of, draws)           # layers: the modules in the order in which they run
    state = trace.replay(3, 5, state)                        # the layers at depth 3 and 4, on another state
    answer = trace.replay(3, None, state)                    # from depth 3 to the end of the forward

A state is what a layer returns, moved to [batch, pos, d_model]; before the first layer it is what that layer is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.foreign import payload
from hooks.foreign.layouts import StateLayout
from hooks.foreign.loopify import Loops


def canonical(layout: StateLayout, value: Tensor, what: str = "a layer's state") -> Float[Tensor, "batch pos d_model"]:
    """``value`` in the layout of the contract. ValueError if it has other axes than ``layout``."""
    if value.ndim != len(layout.own):
        raise ValueError(f"{what} has {value.ndim} axes, {list(value.shape)}, and was declared to be "
                         f"{' × '.join(layout.own)}: pass axes= with the names in the order of the tensor.")
    return layout.canonical(value)


@dataclass(frozen=True)
class Trace:
    """One recorded forward, for some rows of its batch.

    ``call(index)`` runs the module on the inputs of the examples that ``index`` names (None: all), from the same
    random state each time. ``index`` says which example each row of this trace is.
    """

    call: Callable[[Tensor | None], Any]
    layers: tuple[nn.Module, ...]
    layout: StateLayout
    entered: Float[Tensor, "batch pos d_model"]
    outputs: tuple[Any, ...]
    answer: Any
    draws: bool = False                             # does a forward draw random numbers?
    index: Int[Tensor, "row"] | None = None

    @property
    def batch(self) -> int:
        return len(self.entered)

    def rows(self, index: Int[Tensor, "row"]) -> Trace:
        """The same for some of its rows; a row may be taken several times."""
        index = index.to(self.entered.device)
        return replace(self, index=index if self.index is None else self.index[index])

    def state(self, depth: int) -> Float[Tensor, "batch pos d_model"]:
        """The recorded state after ``depth`` layers, of this trace's rows."""
        if depth == 0:
            state = self.entered
        else:
            output = self.outputs[depth - 1]
            state = canonical(self.layout, payload.get(output, _where(output, self.layers[depth - 1])))
        return state if self.index is None else state[self.index]

    def replay(self, start: int, stop: int | None, state: Float[Tensor, "row pos d_model"]) -> Any:
        """Run the layers from ``start`` on, on ``state``: the state before layer ``stop``, or the module's answer."""
        rows = self.batch if self.index is None else len(self.index)
        if len(state) != rows:
            raise ValueError(f"the state has {len(state)} rows and the context {rows}: take context.rows(index) for "
                             "some of the examples, or for several copies of them.")
        if stop is not None and stop <= start:
            return state
        if not self.draws or self.index is None:
            return self._replayed(self.index, start, stop, state)
        return self._in_whole_batches(start, stop, state)

    def is_carried_by_the_state(self, first: int, depth: int) -> bool:
        """Do layer ``depth`` and all later ones do the same, whatever the layers from ``first`` on returned before?

        The state that enters the layer stays as recorded; what earlier layers returned is changed, and nothing may
        come out otherwise. It does where the model adds a layer's result to a sum of its own, outside of the layer.
        """
        outputs = list(self.outputs)
        for i in range(first, depth - 1):
            where = _where(outputs[i], self.layers[i])
            value = payload.get(outputs[i], where)
            outputs[i] = payload.put(outputs[i], where, value.flip(-1) + value.abs().mean())
        state, changed = self.state(depth), replace(self, outputs=tuple(outputs))
        before, after = (_tensor(trace.replay(depth, None, state)) for trace in (self, changed))
        return torch.allclose(before, after, rtol=1e-4, atol=1e-5, equal_nan=True)

    # ------------------------------------------------------------------ private

    def _replayed(self, index: Tensor | None, start: int, stop: int | None, state: Tensor) -> Any:
        native, count = self.layout.original(state), 0
        running: list[int] = []   # layers that have begun and not returned: a loopified one runs others before it does
        reached: list[Any] = []   # what the last layer to be run returned

        def step(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal count
            depth, count = count, count + 1
            _check_order(self.layers, depth, layer)
            if depth < start:
                output = self._output(depth, index)
                if depth == start - 1:
                    output = payload.put(output, _where(output, layer), native)
                payload.REPLAYING.answer = output
                return output
            payload.REPLAYING.answer = None
            if depth == start == 0:
                args, kwargs = payload.with_state(args, kwargs, native, layer)
            running.append(depth)
            return forward(*args, **kwargs)

        def left(layer: nn.Module, args: Any, output: Any) -> None:
            if running and running.pop() + 1 == stop:
                reached.append(output)
                raise _Reached

        with patched(self.layers, step, left):
            payload.REPLAYING.on = True
            try:
                answer = self.call(index)
            except _Reached:
                pass
            finally:
                payload.REPLAYING.on, payload.REPLAYING.answer = False, None
        if reached:  # also where the model's own code has caught the exception and gone on
            return canonical(self.layout, payload.get(reached[0], _where(reached[0], self.layers[(stop or 0) - 1])))
        if stop is not None or count < len(self.layers):
            raise RuntimeError(f"the model ran {count} of its {len(self.layers)} layers when it was run again: its "
                               "number of loops depends on its state, and it cannot be run layer by layer.")
        return answer

    def _in_whole_batches(self, start: int, stop: int | None, state: Tensor) -> Any:
        """For a model that draws random numbers: each example stands where it stood, so that it is given the same."""
        assert self.index is not None
        index, results = self.index.tolist(), {}
        waiting = list(range(len(index)))
        while waiting:
            taken: dict[int, int] = {}
            for row in waiting:
                taken.setdefault(index[row], row)
            batch = Trace.state(replace(self, index=None), start).clone()
            for example, row in taken.items():
                batch[example] = state[row]
            whole = replace(self, index=None)._replayed(None, start, stop, batch)
            for example, row in taken.items():
                results[row] = whole, example
            waiting = [row for row in waiting if row not in results]
        first = results[0][0]
        where: payload.Where = () if isinstance(first, Tensor) else payload.find(first) or ()
        axis = 0 if stop is not None else self.layout.own.index("batch")
        picked = [payload.get(whole, where).select(axis, example) for whole, example in
                  (results[row] for row in range(len(index)))]
        stacked = torch.stack(picked, axis)
        return stacked if isinstance(first, Tensor) else payload.put(first, where, stacked)

    def _output(self, depth: int, index: Tensor | None) -> Any:
        output = self.outputs[depth]
        if index is None:
            return output
        where = _where(output, self.layers[depth])
        axis = self.layout.own.index("batch")
        return payload.put(output, where, payload.get(output, where).index_select(axis, index))


def record(call: Callable[[Tensor | None], Any], layers: Sequence[nn.Module],
           layout_of: Callable[[Tensor], StateLayout], draws: Callable[[], bool]) -> Trace:
    """One forward of the module, ``call(None)``, with what each of ``layers`` returned.

    ``draws`` says, after that forward, whether it drew random numbers.

    ``layout_of`` tells the layout of a state from the first one. Raises RuntimeError if the module runs other layers
    than these, in this order, or another number of times.
    """
    entered: list[Tensor] = []
    outputs: list[Any] = []
    running: list[int] = []

    def step(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        depth = len(outputs)
        _check_order(layers, depth, layer)
        if depth == 0:
            given = kwargs if payload.find(args) is None else args
            where = payload.find(given)
            if where is None:
                raise TypeError(f"{type(layer).__name__} was called without a tensor, so that no state enters it.")
            entered.append(payload.get(given, where))
        running.append(depth)
        outputs.append(None)
        return forward(*args, **kwargs)

    def left(layer: nn.Module, args: Any, output: Any) -> None:
        _where(output, layer)
        outputs[running.pop()] = output

    with patched(layers, step, left):
        answer = call(None)
    if len(outputs) != len(layers):
        raise RuntimeError(f"the model ran {len(outputs)} layers and was declared to run {len(layers)}: the number of "
                           "loops or the list of layers is another one. describe(module, inputs) prints how often "
                           "each module runs.")
    layout = layout_of(entered[0])
    return Trace(call, tuple(layers), layout, canonical(layout, entered[0]), tuple(outputs), answer, draws())


@contextmanager
def patched(layers: Sequence[nn.Module], step: Callable[..., Any],
            left: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """In the block a call of one of ``layers`` is ``step(layer, its own forward, args, kwargs)``.

    ``left(layer, args, output)`` sees what the layer returns after its hooks, but for the one by which `loopify` runs
    the other loops, which acts after it.
    """
    kept: list[tuple[nn.Module, bool, Any]] = []
    removers: list[Any] = []

    def stand_in(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: step(layer, forward, args, kwargs)

    try:
        for layer in dict.fromkeys(layers):
            kept.append((layer, "forward" in layer.__dict__, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = stand_in(layer, layer.forward)
            removers.append(layer.register_forward_hook(left))
            registered: Any = layer._forward_hooks   # an OrderedDict, which torch declares as a dict
            for key, hook in list(registered.items()):
                if isinstance(getattr(hook, "__self__", None), Loops):
                    registered.move_to_end(key)
        yield
    finally:
        for remover in removers:
            remover.remove()
        for layer, own, forward in reversed(kept):
            if own:
                layer.__dict__["forward"] = forward
            else:
                del layer.__dict__["forward"]


# ---------------------------------------------------------------------- private


class _Reached(Exception):
    """The layer at which a replay ends has returned."""


def _tensor(value: Any) -> Tensor:
    where = payload.find(value)
    assert where is not None
    tensor: Tensor = payload.get(value, where)
    return tensor


def _where(output: Any, layer: nn.Module) -> payload.Where:
    where = () if isinstance(output, Tensor) else payload.find(output)
    if where is None:
        raise TypeError(f"{type(layer).__name__} returned {type(output).__name__} without a tensor in it, so that it "
                        "hands no state on: name the module around it or inside it as a layer.")
    return where


def _check_order(layers: Sequence[nn.Module], depth: int, layer: nn.Module) -> None:
    if depth >= len(layers):
        raise RuntimeError(f"the model runs its layers more often than the {len(layers)} times that were declared: "
                           "the number of loops is another one.")
    if layers[depth] is not layer:
        at = [i for i, other in enumerate(layers) if other is layer]
        raise RuntimeError(f"layer {depth} of the run was declared to be {type(layers[depth]).__name__} and the model "
                           f"ran the {type(layer).__name__} that was declared for {at[:3]}: name the layers in the "
                           "order in which they run.")
