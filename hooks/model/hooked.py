"""HookedLoopMDM: a LoopMDM that records and is edited at any site, loop by loop.

Signatures, names and defaults follow TransformerLens' HookedTransformer. Sites that
cannot fire are refused before the run; hooks that should have fired and did not are an
error after it; hooks are always removed. A model is held by one thread at a time, and a
forward of it inside another one (in a hook, for example) is refused.

    model = HookedLoopMDM.from_pretrained("zoo/automaton-loop")
    logits, rec = model.run_with_cache(tokens, n_loops=8, names_filter="blocks.*.hook_resid_post")
    logits = model.run_with_hooks(tokens, n_loops=8, fwd_hooks=[("blocks.2.hook_resid_post@3", fn)])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.contract import HookList, Kind, Levels, LoopedModel
from hooks.edits import PlanEdit, attachments
from hooks.hook_points import Attached, HookFunction, HookPoint, replacing
from hooks.location import located
from hooks.model.config import FOR_TRANSFORMERS, LoopMDMConfig
from hooks.model.inputs import AttentionMask, Tokens, masked_in, real_positions, take
from hooks.model.loopmdm import LoopMDM
from hooks.recording import Cut, Recorder, Recording, Reducer, positions
from hooks.sites import Site, SiteError, SitePattern
from hooks.topology import Topology
from hooks.writing import written_whole

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class RunContext:
    """What the layers of one run need besides the state."""

    topology: Topology
    injected: Float[Tensor, "batch pos d_model"]     # what input injection adds at each loop
    condition: Float[Tensor, "batch d_cond"] | None
    real: Bool[Tensor, "batch pos"] | None = None   # positions that are no padding; None: all

    def rows(self, index: Int[Tensor, "row"]) -> RunContext:
        index = index.to(self.injected.device)
        condition, real = (None if part is None else part[index] for part in (self.condition, self.real))
        return RunContext(self.topology, self.injected[index], condition, real)


class HookedLoopMDM(LoopMDM, PyTorchModelHubMixin, LoopedModel, library_name="loopscope",
                    tags=["looped-transformer", "masked-diffusion"]):
    """A LoopMDM with TransformerLens' recording and editing, per loop."""

    loaded_from = ""  # the folder's name or the hub id

    def run_with_hooks(self, tokens: Tokens, n_loops: int | None = None, *, fwd_hooks: HookList = (),
                       bwd_hooks: HookList = (), t: Float[Tensor, "batch"] | float | None = None,
                       attention_mask: AttentionMask = None) -> Float[Tensor, "batch pos vocab"]:
        """One forward with ``fwd_hooks`` attached; returns the logits.

        A hook is called as ``fn(activation, hook=point)`` and may return a replacement.
        ``bwd_hooks`` get the gradient at their site, when the caller runs backward inside
        ``model.hooks(...)``; here they are refused, since the hooks are gone on return.
        Raises SiteError, before running, for a site that cannot fire with ``n_loops`` loops.
        """
        if bwd_hooks:
            raise ValueError("run_with_hooks removes its hooks when it returns, before a backward pass could use "
                             "them: use `with model.hooks(bwd_hooks=...)` around forward and backward, or "
                             "run_with_cache(loss_fn=...).")
        with self.hooks(fwd_hooks=fwd_hooks, n_loops=n_loops):
            return self(tokens, n_loops, t=t, attention_mask=attention_mask)

    def run_with_cache(self, tokens: Tokens, n_loops: int | None = None, *,
                       names_filter: SitePattern = None, t: Float[Tensor, "batch"] | float | None = None,
                       reduce: Reducer | None = None, pos_slice: Cut | None = None, batch_slice: Cut | None = None,
                       only: Literal["masked", "visible"] | None = None,
                       dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                       loss_fn: Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, ""]] | None = None,
                       attention_mask: AttentionMask = None,
                       ) -> tuple[Float[Tensor, "batch pos vocab"], Recording]:
        """One forward; returns the logits and a `Recording` of the sites that ``names_filter`` names.

        By default every site but ``hook_result`` (large: name it to have it). ``reduce(activation, site)``
        runs inside the hook (see `hooks.reducers`); ``pos_slice``, ``batch_slice``, ``dtype`` and ``device``
        shape the copy (see `Recorder`); ``only`` keeps the masked or the visible positions, on an axis ``point``, and
        no padded ones.
        With ``loss_fn``, a function of the logits to a scalar, the backward pass runs too and
        ``recording.gradients`` holds the gradient of that scalar at the same sites (parameters' ``.grad``
        accumulate as ever).
        """
        if only is not None:
            if pos_slice is not None:
                raise ValueError("pos_slice and only both choose positions: give one of them.")
            given, padding = take(tokens, attention_mask)
            pos_slice = positions(given, self.config.mask_token_id, only, real=real_positions(given, padding))
        if loss_fn is not None and getattr(reduce, "forward_only", False):
            raise ValueError(f"{type(reduce).__name__} compares a loop with the one before it, and a backward pass "
                             "visits loops in reverse: record gradients without it.")
        recorder = Recorder(reduce=reduce, pos=pos_slice, batch=batch_slice, dtype=dtype, device=device)
        space = self.site_space(n_loops)
        sites = space.resolve((lambda name: not name.endswith("hook_result")) if names_filter is None
                              else names_filter)
        patterns = names_filter if isinstance(names_filter, str) else [str(site) for site in sites]
        backward = [(patterns, recorder.backward)] if loss_fn is not None else []
        with (self.hooks(fwd_hooks=[(patterns, recorder)], bwd_hooks=backward, n_loops=n_loops),
              torch.set_grad_enabled(loss_fn is not None or torch.is_grad_enabled())):
            logits = self(tokens, n_loops, t=t, attention_mask=attention_mask)
            topology = self.config.topology(self.clock.ran)
            if loss_fn is not None:
                with self.clock.calling("run_with_cache's loss_fn, or the backward pass after it"):
                    loss_fn(logits).backward()
        names = {site.name: space.names[site.name] for site in sites}
        return logits, recorder.recording(names, topology)

    @contextmanager
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *,
              n_loops: int | None = None) -> Iterator[HookedLoopMDM]:
        """Attach hooks for the length of a ``with`` block, in which the caller runs the model.

        Sites are resolved for forwards of ``n_loops`` loops (default max_loops). Raises SiteError before the
        block for sites that cannot fire, and RuntimeError after it for a hook that did not fire although
        a forward ran.
        """
        n_loops = self._checked_loops(n_loops)
        with self.exclusive():
            attached: list[tuple[HookPoint, Attached]] = []
            replans = self.replans
            try:
                self.replans = (*replans, *(edit.replan for edit in fwd_hooks if isinstance(edit, PlanEdit)))
                space = self.site_space(n_loops)
                for pattern, fn in attachments(fwd_hooks, space):
                    attached += self._attach(space.resolve(pattern), fn)
                for pattern, fn in attachments(bwd_hooks, space):
                    attached += self._attach(space.resolve(pattern), _on_backward(fn))
                runs_before = self.clock.runs
                yield self
            finally:
                self.replans = replans
                for point, entry in attached:
                    point.remove(entry)
            if self.clock.runs > runs_before:
                self._refuse_unfired(attached, n_loops)

    def add_hook(self, site: SitePattern, fn: HookFunction, *, n_loops: int | None = None) -> Callable[[], None]:
        """Attach ``fn`` until the returned function (or `reset_hooks`) is called. Prefer `hooks`."""
        attached = self._attach(self.site_space(n_loops).resolve(site), fn)

        def detach() -> None:
            for point, entry in attached:
                point.remove(entry)

        return detach

    def reset_hooks(self) -> None:
        """Detach everything."""
        for point in self.hook_points.values():
            point.entries = ()

    def _attach(self, sites: list[Site], fn: HookFunction) -> list[tuple[HookPoint, Attached]]:
        by_name: dict[str, set[int]] = {}
        for site in sites:
            by_name.setdefault(site.name, set()).update(site.loop)
        points = [(self.hook_points[name], loops) for name, loops in by_name.items()]
        return [(point, point.add(fn, loops if point.looped else None)) for point, loops in points]

    def _refuse_unfired(self, attached: list[tuple[HookPoint, Attached]], n_loops: int) -> None:
        missed: set[str] = set()
        for point, (loops, _, fired) in attached:
            if loops is not None:  # adaptive looping may stop before a loop, and says so
                missed.update(f"{point.name}@{loop}" for loop in loops - fired
                              if loop < self.clock.ran or not self.clock.stopped_early)
            elif not fired:
                missed.add(point.name)
        if missed:
            raise RuntimeError(f"{len(missed)} hooked site(s) never fired, {min(missed)} first: the hooks were placed "
                               f"for {n_loops} loops and the last forward ran {self.clock.ran}. Give hooks() and "
                               "the forward the same n_loops.")

    # ------------------------------------------------- the contract of `hooks.contract`

    @property
    def module(self) -> HookedLoopMDM:
        """Itself: the network is the hooked model."""
        return self

    @property
    def name(self) -> str:
        """The folder or hub id it was loaded from, or its shape."""
        c = self.config
        return self.loaded_from or (f"LoopMDM {c.n_head_layers} + {c.n_loop_layers}·S + {c.n_tail_layers}, "
                                    f"width {c.d_model}")

    @property
    def max_loops(self) -> int:
        return self.config.max_loops

    @property
    def mask_token_id(self) -> int:
        return self.config.mask_token_id

    def topology(self, n_loops: int | None = None) -> Topology:
        return self.config.topology(self._checked_loops(n_loops))

    def site(self, depth: int, kind: Kind = "resid_post", *, n_loops: int | None = None) -> str:
        return self.topology(n_loops).site_at(depth, f"hook_{kind}")

    def attention(self, depth: int, *, n_loops: int | None = None) -> str:
        return self.topology(n_loops).site_at(depth, "attn.hook_pattern")

    def enter(self, inputs: Tokens, n_loops: int | None = None, *, t: Levels = None,
              attention_mask: AttentionMask = None) -> tuple[Float[Tensor, "batch pos d_model"], RunContext]:
        """The embedded tokens, and the context of a run of ``n_loops`` loops.

        Raises ValueError under an edit of the plan (skip, repeat, swap): `apply` runs layers in their own order.
        """
        with self.exclusive():
            if self.replans:
                raise ValueError("loops are skipped, repeated or swapped by an edit, and enter() begins a run of the "
                                 "layers in their own order: leave the edit's block first.")
            tokens, n_loops, real = self._entering(inputs, n_loops, attention_mask)
            condition, embedded = self.condition(tokens, t, real), self.embed_tokens(tokens, real)
            injected = self._injected(embedded, condition, real)
            return embedded, RunContext(self.config.topology(n_loops), injected, condition, real)

    def apply(self, depth: Any, state: Any = None, context: Any = None) -> Any:
        """The layer at ``depth`` on ``state`` [batch, pos, d_model]; ``apply(fn)`` is still that of ``nn.Module``."""
        if callable(depth):
            return super().apply(depth)
        topology = context.topology
        if not 0 <= depth < topology.depth:
            raise IndexError(f"depth {depth} is not a layer of this run: they are 0..{topology.depth - 1}.")
        layer, loop = topology.unrolled()[depth]
        with self.exclusive():
            if loop is not None:
                self.clock.refuse_inside()
                self.clock.loop = loop
                if (depth - topology.n_head) % topology.n_mid == 0:
                    state = self.loop_input(state, loop, context.injected, index=loop)
            return self._layers(state, (layer,), context.condition, context.real)

    def read(self, state: Float[Tensor, "batch pos d_model"], context: Any) -> Float[Tensor, "batch pos vocab"]:
        with self.exclusive():
            return self.unembed(state, context.condition)

    def _injected(self, embedded: Tensor, condition: Tensor | None, real: Tensor | None) -> Tensor:
        """What input injection adds in a run; the head is run for it once more where its output is injected, unseen."""
        if self.config.input_injection != "head":
            return embedded
        muted, self.clock.muted = self.clock.muted, True
        try:
            return self.injected(embedded, self.head(embedded, condition, real))
        finally:
            self.clock.muted = muted

    def scored(self, inputs: Tokens) -> Bool[Tensor, "batch pos"]:
        return masked_in(inputs, self.config.mask_token_id)

    def targets(self, inputs: Tokens) -> None:
        take(inputs)

    # --------------------------------------------------------------- other libraries

    def unroll(self, n_loops: int | None = None, *, t: float | None = None) -> TransformerBridge:
        """The model as a TransformerLens bridge of ``n_loops`` loops that shares its parameters (`hooks.bridges`)."""
        from hooks.bridges.tl_adapter import unroll

        return unroll(self, n_loops, t=t)

    # ------------------------------------------------------------ saving, loading

    def _save_pretrained(self, save_directory: Path) -> None:
        """config.json and model.safetensors, each written under a temporary name, then renamed."""
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        with written_whole(save_directory / "model.safetensors") as temporary:
            save_file(state, temporary, {"format": "pt"})
        text = json.dumps({**FOR_TRANSFORMERS, **self.config.to_dict()}, indent=1) + "\n"
        with written_whole(save_directory / "config.json") as temporary:
            temporary.write_text(text)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> HookedLoopMDM:
        """Load config.json and model.safetensors from a folder or a hub id, in eval mode.

        Raises FileNotFoundError (or NotADirectoryError) for a folder that is not there, before the hub is asked
        (`hooks.location`), and these or ValueError naming the file that is missing, damaged or does not fit.
        ``options`` are those of huggingface_hub's mixin (revision, cache_dir, token, map_location …).
        """
        try:
            return super().from_pretrained(located(pretrained_model_name_or_path), **options)
        except LocalEntryNotFoundError as error:  # the mixin fetches config.json itself, and reads it
            raise _not_fetched(pretrained_model_name_or_path, error) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}/config.json is not JSON ({error}): "
                             "copy or download it again.") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, cache_dir: str | Path | None = None,
                         force_download: bool = False, local_files_only: bool = False,
                         token: str | bool | None = None, map_location: str = "cpu", **model_kwargs: Any,
                         ) -> HookedLoopMDM:
        def file(name: str) -> Path:
            if Path(model_id).is_dir():
                path = Path(model_id) / name
                if not path.exists():
                    raise FileNotFoundError(f"{path} is missing: a model folder holds config.json and "
                                            "model.safetensors.")
                return path
            try:
                return Path(hf_hub_download(model_id, name, revision=revision, cache_dir=cache_dir, token=token,
                                            force_download=force_download, local_files_only=local_files_only))
            except Exception as error:
                raise _not_fetched(model_id, error) from error

        config = model_kwargs.get("config")
        if not isinstance(config, LoopMDMConfig):
            path = file("config.json")
            try:
                config = LoopMDMConfig.from_dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from error
        model = cls(config)
        path = file("model.safetensors")
        try:
            state = load_file(path, device=map_location)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again.") from error
        _check_state(model, state, path)
        model.load_state_dict(state)
        model.loaded_from = Path(model_id).name if Path(model_id).is_dir() else model_id
        return model.to(map_location).eval()


def _on_backward(fn: HookFunction) -> HookFunction:
    """A forward hook that registers ``fn`` on the activation's gradient, for the loop that is running."""
    def call(activation: Tensor, /, *, hook: HookPoint) -> None:
        if not activation.requires_grad:
            raise RuntimeError(f"no gradient reaches {hook.site}: run the forward with gradients enabled, "
                               "outside torch.no_grad() and with parameters that require them.")
        frozen = HookPoint(hook.name, type(hook.clock)(), hook.looped)
        clock, frozen.clock.loop = hook.clock, hook.clock.loop

        def on_gradient(gradient: Tensor) -> Tensor | None:
            with clock.calling(f"the backward hook at {frozen.site}"):
                returned = fn(gradient, hook=frozen)
            return None if returned is None else replacing(returned, gradient, f"{frozen.site} (gradient)")

        activation.register_hook(on_gradient)
    return call


def _not_fetched(model_id: str | Path, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(f"'{model_id}' is neither a folder here nor a model that could be fetched from the hub "
                             f"({type(error).__name__}: {error})")


def _check_state(model: LoopMDM, state: dict[str, Tensor], path: Path) -> None:
    """Every tensor there, none too many, each of the right shape; ValueError naming the file and the first mismatch."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not part of this model" for key in state if key not in expected]
    problems += [f"{key} has shape {tuple(state[key].shape)}, config.json asks for {shape}"
                 for key, shape in expected.items() if key in state and tuple(state[key].shape) != shape]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {problems[0]}"
                         + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
                         + ". Was one of them replaced without the other?")


__all__ = ["HookList", "HookedLoopMDM", "SiteError"]
