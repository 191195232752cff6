"""adopt: any looped ``nn.Module`` as an analysis sees it (`hooks.contract`), so that every probe takes it.

ALBERT, HRM-Text, Ouro, Huginn, models that `hooks.loopify` loops and TransformerLens bridges are known from their
configuration. For any other module a few lines say what loops:

    model = adopt(AlbertForMaskedLM(config), tokenizer=tokenizer)
    model = adopt(mine, layers=["block"], n_loops=8)                              # the module's own forward answers
    model = adopt(mine, layers=["block.*"], n_loops="n_loops", readout="unembed")  # a keyword or an attribute sets S
    read_lens(model, tokens, n_loops=4, kind="coda")

The module's own code runs, always: `apply` and `resume` run its forward with the layers before answered from a record
of the same inputs (`hooks.foreign.replay`), so that norms, adapters and injections between layers take part as they
are. Recording and editing go through `hooks.watch`, with its site names.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooks.contract import Forward, HookList, Inputs, Kind, Levels, LoopedModel, Unavailable, tensors_of
from hooks.foreign import payload
from hooks.foreign.architectures import Architecture, declared, known, pattern_element
from hooks.foreign.discovery import discover, random_state_kept, unseen
from hooks.foreign.layouts import BATCH_FIRST, StateLayout, declared_layout
from hooks.foreign.places import places_of
from hooks.foreign.replay import Trace, canonical, record
from hooks.foreign.schedules import Counted, Cycles, Discovered, Schedule, Scheduled
from hooks.foreign.watching import watch
from hooks.recording import Cut, Recording, Reducer
from hooks.sites import SitePattern, SiteSpace
from hooks.topology import Topology

Readout = str | Callable[[Tensor], Tensor]


def adopt(module: nn.Module, *, layers: Sequence[str] | None = None, n_loops: int | str | None = None,
          readout: Readout | None = None, attention: str | None = None, axes: Sequence[str] | None = None,
          schedule: Schedule | Mapping[str, Cycles] | None = None, tokenizer: Any = None,
          seed: int = 0) -> AdoptedModel:
    """``module`` as a `hooks.contract.LoopedModel`. Everything that its configuration tells may be left out.

    ``layers``: the looped modules, by path or glob, in the order in which they run in one loop. With ``schedule``
    ({path: number of loops}), layers that it does not cover run once, before or after the loop.
    ``n_loops``: how many loops it runs; or the name of the keyword of its forward, or of the attribute
    ("core.n_loops"), that sets the number, so that other numbers can be run.
    ``readout``: what makes logits of a state, a path or a function of the state in the module's own layout; by
    default the module's own code after the last layer.
    ``attention``: the attention pattern's site relative to a layer, "attn.hook_out.1", or "attn" for the second
    thing that this module returns.
    ``axes``: the layout of a state, by default ("batch", "pos", "d_model"), or ("batch", "d_model") for two axes.
    ``tokenizer``: names tokens and knows the mask, which a masked model is scored at.
    ``seed``: of every forward's random numbers, so that a model that starts from a random state (Huginn) starts from
    the same one; torch's random state is afterwards what it was.

    Raises ValueError that says what is missing, and Unavailable, later, for what the model cannot give.
    """
    if isinstance(module, LoopedModel):
        raise ValueError(f"{type(module).__name__} meets the contract by itself: pass it on as it is.")
    if not isinstance(module, nn.Module):
        raise TypeError(f"adopt takes an nn.Module, not {type(module).__name__}.")
    architecture = known(module) if layers is None else None
    if architecture is None:
        architecture = declared(module, layers, n_loops, schedule)
    elif schedule is not None:
        raise ValueError("schedule belongs to layers: name both, or neither for a model that is known.")
    return AdoptedModel(module, architecture, n_loops=n_loops, readout=readout, attention=attention, axes=axes,
                        tokenizer=tokenizer, seed=seed)


@dataclass(frozen=True)
class ForeignContext:
    """A recorded forward, which layers are run in."""

    topology: Topology
    trace: Trace

    def rows(self, index: Int[Tensor, "row"]) -> ForeignContext:
        return ForeignContext(self.topology, self.trace.rows(index))


class AdoptedModel(LoopedModel):
    """A foreign looped model that meets the contract; made by `adopt`. ``module`` is the model itself."""

    def __init__(self, module: nn.Module, architecture: Architecture, *, n_loops: int | str | None,
                 readout: Readout | None, attention: str | None, axes: Sequence[str] | None, tokenizer: Any,
                 seed: int):
        if attention is not None:
            architecture = replace(architecture, attention=pattern_element(attention))
        self._module, self.architecture, self.tokenizer, self.seed = module, architecture, tokenizer, seed
        self._drew = False
        self._max_loops = n_loops if isinstance(n_loops, int) else architecture.n_loops
        self._layout = None if axes is None else declared_layout(tuple(axes))
        if self._layout is not None and set(self._layout.own) not in ({*BATCH_FIRST}, {"batch", "d_model"}):
            raise ValueError(f"axes name the layout of a state: {BATCH_FIRST} in some order, or ('batch', 'd_model') "
                             f"where there are no positions, not {tuple(axes or ())!r}.")
        self._lock = threading.RLock()
        self._parameters = inspect.signature(module.forward).parameters
        self._readout = module.get_submodule(readout) if isinstance(readout, str) else readout
        self._checked_readout = self._checked_state = False
        self._seen: StateLayout | None = None   # of states with two axes, once one was seen
        self._counted: dict[int, Discovered] = {}
        self.topology(self._max_loops)

    def __repr__(self) -> str:
        return f"AdoptedModel({self.name}, {self.topology()})"

    # ---- what it is

    @property
    def name(self) -> str:
        config = getattr(self.module, "config", None)
        return getattr(config, "name_or_path", "") or type(self.module).__name__

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def max_loops(self) -> int:
        return self._max_loops

    @property
    def mask_token_id(self) -> int | None:
        return getattr(self.tokenizer, "mask_token_id", None)

    def topology(self, n_loops: int | None = None) -> Topology:
        n_loops = self._max_loops if n_loops is None else n_loops
        if not isinstance(n_loops, int) or isinstance(n_loops, bool) or n_loops < 1:
            raise ValueError(f"n_loops must be a whole number of at least 1, not {n_loops!r}.")
        if self.architecture.with_loops is None and n_loops != self.architecture.n_loops:
            raise Unavailable(f"{self.name} runs {self.architecture.n_loops} loops, and what would make it run "
                              f"{n_loops} is not known: adopt it with n_loops='the keyword or attribute that sets "
                              "them'.")
        return self.architecture.topology(n_loops)

    def site_space(self, n_loops: int | None = None) -> SiteSpace:
        """Every site of a run; until one is recorded, modules outside the declared loop are taken to run once."""
        return places_of(self.module, self._schedule(n_loops)).space

    def site(self, depth: int, kind: Kind = "resid_post", *, n_loops: int | None = None) -> str:
        if kind not in self.architecture.hooks:
            raise Unavailable(f"{self.name} has no site of its own for {kind}: hooks.describe(module, inputs) lists "
                              "its modules, and each has hook_in and hook_out.")
        return self.topology(n_loops).site_at(depth, f"hook_{kind}")

    def attention(self, depth: int, *, n_loops: int | None = None) -> str:
        if self.architecture.attention is None:
            raise Unavailable(f"{self.name}: where the attention pattern of a layer is, is not known. If a module of "
                              "the layer returns it, pass adopt(..., attention='attn.hook_out.1').")
        chosen = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        if self.architecture.needs_eager and chosen not in (None, "eager"):
            raise Unavailable(f"{self.name} runs attention in a fused kernel ({chosen}), which makes no pattern: load "
                              "it with attn_implementation=\"eager\".")
        return self.topology(n_loops).site_at(depth, "attn.hook_pattern")

    # ---- running, recording, editing

    def __call__(self, inputs: Inputs, n_loops: int | None = None, *,
                 t: Levels = None) -> Float[Tensor, "batch pos vocab"]:
        with self.exclusive():
            if self._own_logits():
                return self._logits(self._run(inputs, n_loops))
            _, context = self.enter(inputs, n_loops)
            return self.read(context.trace.state(context.topology.depth), context)

    def run_with_cache(self, inputs: Inputs, n_loops: int | None = None, *, names_filter: SitePattern = None,
                       t: Levels = None, reduce: Reducer | None = None, pos_slice: Cut | None = None,
                       batch_slice: Cut | None = None, only: Literal["masked", "visible"] | None = None,
                       dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                       loss_fn: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Recording]:
        if only is not None:
            if pos_slice is not None:
                raise ValueError("pos_slice and only both choose positions: give one of them.")
            pos_slice = self.scored(inputs) == (only == "masked")
        with (self.exclusive(), torch.set_grad_enabled(loss_fn is not None or torch.is_grad_enabled())):
            self._count_modules(inputs, n_loops)
            with self._watch(n_loops, names_filter, reduce=reduce, pos_slice=pos_slice, batch_slice=batch_slice,
                             dtype=dtype, device=device, gradients=loss_fn is not None) as rec:
                try:
                    logits = self(inputs, n_loops)
                except TypeError as error:
                    if (sought := self.architecture.attention) is None or f"{sought}" not in str(error):
                        raise
                    raise Unavailable(f"{self.name} makes no attention pattern at {sought} (a fused kernel makes "
                                      "none): load it with attn_implementation=\"eager\" if it has that, or name the "
                                      "module that returns it, adopt(..., attention='attn.hook_out.1').") from error
                if loss_fn is not None:
                    loss_fn(logits).backward()
            rec.topology = self.topology(n_loops)
            return logits, rec

    def run_with_hooks(self, inputs: Inputs, n_loops: int | None = None, *, fwd_hooks: HookList = (),
                       bwd_hooks: HookList = (), t: Levels = None) -> Tensor:
        if bwd_hooks:
            raise ValueError("run_with_hooks removes its hooks when it returns, before a backward pass could use "
                             "them: use `with model.hooks(bwd_hooks=...)` around forward and backward, or "
                             "run_with_cache(loss_fn=...).")
        with self.hooks(fwd_hooks=fwd_hooks, n_loops=n_loops):
            return self(inputs, n_loops)

    @contextmanager
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *,
              n_loops: int | None = None) -> Iterator[AdoptedModel]:
        with self.exclusive(), self._watch(n_loops, (), fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
            yield self

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            yield

    # ---- running by hand

    def enter(self, inputs: Inputs, n_loops: int | None = None, *,
              t: Levels = None) -> tuple[Float[Tensor, "batch pos d_model"], ForeignContext]:
        with self.exclusive():
            topology = self.topology(n_loops)
            trace = record(lambda index: self._run(inputs if index is None else self.select(inputs, index), n_loops),
                           self.architecture.order(self.module, topology.n_loops), self._layout_of, lambda: self._drew)
            context = ForeignContext(topology, trace)
            self._seen = trace.layout if trace.layout.own == ("batch", "d_model") else None
            self._check_readout(context)
            self._check_state(context)
            return trace.entered, context

    def apply(self, depth: int, state: Tensor, context: Any) -> Tensor:
        return self.walk(state, context, depth, depth + 1)

    def walk(self, state: Tensor, context: Any, start: int = 0, stop: int | None = None) -> Tensor:
        end = context.topology.depth
        stop = end if stop is None else stop
        if not 0 <= start <= stop <= end:
            raise IndexError(f"depths {start} to {stop} are not in this run: its layers are 0..{end - 1}.")
        with self.exclusive():
            moved: Tensor = context.trace.replay(start, stop, state)
            return moved

    def resume(self, depth: int, state: Tensor, context: Any) -> Tensor:
        end = context.topology.depth
        if not 0 <= depth <= end:
            raise IndexError(f"depth {depth} is not in this run: its layers are 0..{end - 1}.")
        with self.exclusive():
            if self._own_logits():
                return self._logits(context.trace.replay(depth, None, state))
            return self.read(self.walk(state, context, depth), context)

    def read(self, state: Tensor, context: Any) -> Tensor:
        with self.exclusive():
            if self._readout is None:
                return self._logits(context.trace.replay(context.topology.depth, None, state))
            layout: StateLayout = context.trace.layout
            return canonical(layout, self._readout(layout.original(state)), "the readout's result")

    def run(self, inputs: Inputs, n_loops: int | None = None, *, t: Levels = None) -> Forward:
        _, context = self.enter(inputs, n_loops)
        states = tuple(context.trace.state(depth) for depth in range(context.topology.depth + 1))
        own = self._logits(context.trace.answer) if self._own_logits() else self.read(states[-1], context)
        return Forward(states, own, context)

    # ---- what its answers are about

    def scored(self, inputs: Inputs) -> Bool[Tensor, "batch pos"]:
        tokens = self._tokens(inputs)
        answers = self.architecture.answers
        if answers == "masked" or (answers == "any" and self.mask_token_id is not None):
            if self.mask_token_id is None:
                raise Unavailable(f"{self.name} is a masked model, and which token is the mask is not known: adopt it "
                                  "with tokenizer=, whose mask_token_id says it.")
            return tokens == self.mask_token_id
        if answers == "next":
            real = self._real(inputs, tokens)
            return torch.cat([real[:, 1:] & real[:, :-1], torch.zeros_like(real[:, :1])], dim=1)
        return torch.ones_like(tokens, dtype=torch.bool)

    def targets(self, inputs: Inputs) -> Int[Tensor, "batch pos"] | None:
        if self.architecture.answers != "next":
            return None
        tokens = self._tokens(inputs)
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
        return following.masked_fill(~self.scored(inputs), -1)

    def decode(self, ids: Int[Tensor, "pos"]) -> list[str]:
        if hasattr(self.tokenizer, "convert_ids_to_tokens"):
            return [str(token) for token in self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])]
        return super().decode(ids)

    def batch_axis(self, inputs: Inputs) -> int:
        if self._layout is None or tensors_of(inputs)[0].ndim < 2:
            return 0
        return [name for name in self._layout.own if name != "d_model"].index("batch")

    # ------------------------------------------------------------------ private

    def _run(self, inputs: Inputs, n_loops: int | None) -> Any:
        """The module's own answer, from the same random state each time."""
        topology = self.topology(n_loops)
        setting = self.architecture.with_loops
        given = inputs if isinstance(inputs, (tuple, list, Mapping)) else (inputs,)
        if not isinstance(given, Mapping) and not all(isinstance(part, Tensor) or part is None for part in given):
            raise TypeError(f"inputs must be tensors, not {type(given[0]).__name__}: torch.as_tensor makes one of a "
                            "list or an array.")
        with nullcontext({}) if setting is None else setting(topology.n_loops) as keywords:
            more = dict(keywords)
            if "use_cache" in self._parameters:
                more["use_cache"] = False
            with random_state_kept(self.seed):
                before = torch.get_rng_state()
                answer = (self.module(**{**given, **more}) if isinstance(given, Mapping) else
                          self.module(*given, **more))
                self._drew = not torch.equal(before, torch.get_rng_state())
            return answer

    def _own_logits(self) -> bool:
        """Does the module's own forward answer in logits? With ``readout`` the state is read instead."""
        return self._readout is None

    def _check_state(self, context: ForeignContext) -> None:
        """Warns, once, if later loops depend on more of the earlier ones than the state that a layer returns."""
        if self._checked_state or not self.architecture.carries:
            return
        topology = context.topology
        last = topology.n_head + topology.n_loops * topology.n_mid - 1
        if last - 1 > topology.n_head:   # else nothing comes before the state that could matter beside it
            self._checked_state = True
            with unseen(self.module):
                carried = context.trace.is_carried_by_the_state(topology.n_head, last)
            if not carried:
                warnings.warn(f"{self.name}: a loop depends on more of the earlier ones than its layers return, as "
                              "where their result is added to a sum outside of them. Recordings and edits are right; "
                              "lenses, exchanges and whatever runs layers on other states see a part of the state "
                              "only. Name the module around the sum as the layer.", stacklevel=3)

    def _check_readout(self, context: ForeignContext) -> None:
        """ValueError if the declared readout of the last state is not what the module itself answers in that shape."""
        answer = context.trace.answer
        if self._readout is None or self._checked_readout:
            return
        last = context.trace.state(context.topology.depth)
        with unseen(self.module):
            read = self.read(last, context)
        try:
            own = self._logits(answer)
        except (Unavailable, ValueError):  # it answers in something else: then the readout is all there is
            own = last
        if own.shape == read.shape and not (own.shape == last.shape and torch.equal(own, last)):
            apart = float((own - read).detach().abs().max())
            if not apart <= 1e-3 * (1 + float(own.detach().abs().max())):
                raise ValueError(f"the readout of the last layer's state differs from what {self.name} answers, by up "
                                 f"to {apart:.3g}: layers between the loop and the answer are missing from layers=, or "
                                 "leave readout out, and the model's own code reads the state.")
        self._checked_readout = True

    def _logits(self, answer: Any) -> Tensor:
        if not isinstance(answer, Tensor):
            named = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
            if named is None and isinstance(answer, (tuple, list)):
                where = payload.find(answer)
                named = None if where is None else payload.get(answer, where)
            if not isinstance(named, Tensor):
                raise Unavailable(f"{self.name} answers with {type(answer).__name__}, in which there are no logits: "
                                  "adopt the model with its head, or pass readout=, a function of the state.")
            answer = named
        return canonical(self._layout_of(answer), answer, "the model's answer")

    def _layout_of(self, state: Tensor) -> StateLayout:
        if self._layout is None:
            return StateLayout(("batch", "d_model") if state.ndim == 2 else BATCH_FIRST)
        return self._layout

    def _tokens(self, inputs: Inputs) -> Tensor:
        """The tokens [batch, pos], or for inputs that are not tokens zeros of that shape."""
        if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor):
            return inputs["input_ids"]
        first = tensors_of(inputs)[0]
        if self.batch_axis(inputs):
            first = first.transpose(0, 1)
        if first.is_floating_point():
            without = self._layout is not None and "pos" not in self._layout.own
            return first.new_zeros(first.shape[:2] if first.ndim > 2 and not without else (len(first), 1),
                                   dtype=torch.long)
        return first if first.ndim > 1 else first[:, None]

    def _real(self, inputs: Inputs, tokens: Tensor) -> Tensor:
        """Positions that are not padding."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.shape == tokens.shape else torch.ones_like(
            tokens, dtype=torch.bool)

    def _schedule(self, n_loops: int | None) -> Scheduled:
        n_loops = self.topology(n_loops).n_loops
        return Counted(self.architecture.schedule(n_loops), self._counted.get(n_loops))

    def _count_modules(self, inputs: Inputs, n_loops: int | None) -> None:
        """Once for each number of loops: how often the modules around the layers run, which nobody has declared."""
        n_loops = self.topology(n_loops).n_loops
        if self._layout is None and tensors_of(inputs)[0].is_floating_point():
            self._seen = StateLayout(("batch", "d_model")) if tensors_of(inputs)[0].ndim == 2 else None
        if n_loops not in self._counted:
            self._counted[n_loops] = discover(self.module, call=lambda: self._run(inputs, n_loops)).schedule

    def _watch(self, n_loops: int | None, sites: SitePattern, **options: Any) -> Any:
        axes = self._layout or self._seen
        return watch(self.module, sites, schedule=self._schedule(n_loops), axes=None if axes is None else axes.own,
                     **options)
