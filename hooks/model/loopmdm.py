"""LoopMDM (2605.26106): a masked-diffusion denoiser that applies its middle layers S times.

    H(0) = head(tokens),  H(k) = mid(H(k−1)) for k = 1..S,  logits = tail(H(S))

The mid layers share their weights over the S loops, so S is a compute knob at inference.
The forward pass alone: `hooks.model.config` shapes it, `hooks.model.hooked` records and edits it,
`hooks.model.diffusion` corrupts and samples.

    model = LoopMDM(LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=96))
    logits = model(tokens, n_loops=16)                        # [batch, pos, vocab]
    logits, used = model.forward_adaptive(tokens, threshold=0.05, max_loops=32)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.checkpointing import guard_recomputation, may_be_checkpointed, recomputing
from hooks.hook_points import HookPoint, LoopClock
from hooks.model.config import LoopMDMConfig
from hooks.model.inputs import AttentionMask, Tokens, as_given, real_positions, take
from hooks.model.layers import Block, NormLayer, Rotary, TimestepEmbedding, rotary_tables
from hooks.plan import Pass, Plan, Replan, run, space_of, straight
from hooks.sites import SiteSpace

MASK_LOGIT = -2.0 ** 15
"""Added to the mask token's logit: a denoiser never predicts the mask (2406.07524, with −10⁶ there). float16 and
bfloat16 hold this number exactly, and its exponential is 0 in every precision."""


class AdaptiveOutput(NamedTuple):
    """What `LoopMDM.forward_adaptive` returns."""

    logits: Float[Tensor, "batch pos vocab"]
    loops_used: Int[Tensor, "batch"]


class LoopMDM(nn.Module):
    """The looped denoiser, with hook points. Inference at any ``n_loops``, also above ``max_loops``.

    Sites beside TransformerLens' own: ``hook_loop_in@k`` is the state that enters loop k,
    ``hook_injection@k`` and ``hook_loop_embed@k`` what is added to it there, all
    [batch, pos, d_model] and present only where the configuration has them.
    """

    position_ids: Int[Tensor, "group pos"]
    mask_bias: Float[Tensor, "vocab"]

    def __init__(self, config: LoopMDMConfig):
        super().__init__()
        self.config = config
        self.clock = LoopClock()
        self.hook_points: dict[str, HookPoint] = {}
        self.replans: tuple[Replan, ...] = ()  # edits of the order of loops and layers, set by HookedLoopMDM.hooks
        self._spaces: dict[int, SiteSpace] = {}
        self._rotary_tables: Rotary | None = None  # no buffers, which a model that was narrowed would keep rounded
        self._rotary_cut: tuple[Tensor, Rotary] | None = None
        self._lock = threading.RLock()
        d = config.d_model
        self.embed = nn.Embedding(config.vocab_size, d)
        self.hook_embed = self._point("hook_embed")
        self.pos_embed = nn.ModuleList()
        if config.position != "rotary":
            groups = config.position_groups or (tuple(range(config.max_seq_len)),)
            self.pos_embed.extend(nn.Embedding(max(group) + 1, d) for group in groups)
            self.register_buffer("position_ids", torch.tensor(groups), persistent=False)
            self.hook_pos_embed = self._point("hook_pos_embed")
        self.time_embed = TimestepEmbedding(config.d_cond) if config.conditioned else None
        self.blocks = nn.ModuleList(self._block(layer) for layer in range(config.n_head_layers))
        self.hook_loop_in = self._point("hook_loop_in", looped=True)
        if config.input_injection != "none":
            self.hook_injection = self._point("hook_injection", looped=True)
        if config.input_injection == "head":
            self.injection_gate = nn.Parameter(torch.zeros(d))
        if config.loop_embedding == "learned":
            self.loop_embed = nn.Embedding(config.max_loops, d)
            self.hook_loop_embed = self._point("hook_loop_embed", looped=True)
        self.blocks.extend(self._block(layer) for layer in range(config.n_head_layers, config.n_layers))
        self.ln_final = NormLayer(config.norm, d, config.norm_eps, self._point, "ln_final")
        self.final_ada = nn.Linear(config.d_cond, 2 * d) if config.conditioned else None
        self.unembed_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.unembed_weight = None if config.tie_embeddings else nn.Parameter(torch.zeros(config.vocab_size, d))
        mask_bias = torch.zeros(config.vocab_size)
        mask_bias[config.mask_token_id] = MASK_LOGIT
        self.register_buffer("mask_bias", mask_bias, persistent=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights with variance 1/fan-in, unit-scale embeddings, zero unembedding and adaLN gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        if self.config.tie_embeddings:
            nn.init.normal_(self.embed.weight, std=self.config.d_model ** -0.5, generator=generator)
        if self.config.loop_embedding == "learned":
            nn.init.zeros_(self.loop_embed.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("ada"):
                nn.init.zeros_(module.weight)

    # ---------------------------------------------------------------- the model

    def forward(self, tokens: Tokens, n_loops: int | None = None, *,
                t: Float[Tensor, "batch"] | float | None = None,
                attention_mask: AttentionMask = None) -> Float[Tensor, "batch pos vocab"]:
        """Logits over the vocabulary at every position.

        ``n_loops`` defaults to ``config.max_loops``. ``t`` in (0, 1] is the noise level, read only
        by models conditioned on time; by default it is the share of masked positions. ``attention_mask`` [batch, pos]
        is 1 at real positions and 0 at padding, before or after them (`hooks.model.inputs`): real positions get the
        logits of the sequence without its padding, those at padded positions mean nothing.
        Raises TypeError for tokens that are no tensor, ValueError for a bad shape, a token outside the vocabulary, an
        empty batch, or n_loops < 1, and RuntimeError for a forward inside a forward of the same model (in a hook, for
        example).
        """
        with self.running():
            tokens, n_loops, real = self._entering(tokens, n_loops, attention_mask)
            condition = self.condition(tokens, t, real)
            x, injected = self.begin(tokens, condition, real)
            if replans := self.replans:
                plan = self.plan(n_loops)
                if recomputing() and not self.clock.edits_again(replans):
                    raise RuntimeError("the backward pass runs the model again (torch.utils.checkpoint) under an edit "
                                       "of its loops or layers that was not there in the forward pass: call backward "
                                       "before placing it, or switch checkpointing off.")
                if may_be_checkpointed():
                    guard_recomputation("loops or layers skipped, repeated or swapped", lambda: self.replans is replans,
                                        around=lambda: self.clock.repeating(replans, 0))
                x, n_loops = run(self, plan, x, injected, condition, real), len(plan)
            else:
                for k in range(n_loops):
                    x = self.loop(x, k, injected, condition, real)
            self.clock.finish(n_loops, n_loops)
            return self.tail(x, condition, real)

    def forward_adaptive(self, tokens: Tokens, *, threshold: float, max_loops: int | None = None,
                         t: Float[Tensor, "batch"] | float | None = None,
                         attention_mask: AttentionMask = None) -> AdaptiveOutput:
        """Loop each example until ‖H(k) − H(k−1)‖ / ‖H(k−1)‖ < ``threshold``, at most ``max_loops`` times.

        Norms are taken over real positions and d_model together. An example that has stopped keeps its
        state while the others go on. ``loops_used`` [batch] counts the loops applied to each.
        Raises what `forward` raises.
        """
        if not threshold >= 0:
            raise ValueError(f"threshold must be a relative change of at least 0, not {threshold}.")
        with self.running():
            if self.replans:
                raise ValueError("loops are skipped, repeated or swapped by an edit, and adaptive looping decides by "
                                 "itself which loops run: use a fixed n_loops.")
            tokens, max_loops, real = self._entering(tokens, max_loops, attention_mask)
            condition = self.condition(tokens, t, real)
            x, injected = self.begin(tokens, condition, real)
            wide = torch.promote_types(x.dtype, torch.float32)  # a norm overflows float16 before a state does
            running = torch.ones(len(tokens), dtype=torch.bool, device=x.device)
            used = torch.zeros(len(tokens), dtype=torch.long, device=x.device)
            for k in range(max_loops):
                new = self.loop(x, k, injected, condition, real)
                compared = new - x, x
                if real is not None:
                    compared = compared[0] * real[..., None], compared[1] * real[..., None]
                moved, length = (y.flatten(1).to(wide).norm(dim=1) for y in compared)
                change = moved / length.clamp_min(1e-12)
                x = torch.where(running[:, None, None], new, x)
                used += running
                running = running & (change >= threshold)
                if not running.any():
                    break
            self.clock.finish(k + 1, max_loops)
            return AdaptiveOutput(self.tail(x, condition, real), used)

    def embed_tokens(self, tokens: Int[Tensor, "batch pos"],
                     real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
        """Token embedding, plus learned positions where there are any; these count from the first ``real`` one."""
        x = self.hook_embed(self.embed(tokens))
        if self.config.position == "rotary":
            return x
        if real is None:
            ids = self.position_ids[:, : tokens.shape[1]]
        else:
            ids = self.position_ids[:, (real.cumsum(1) - 1).clamp_min(0)]  # [group, batch, pos]
        positions = torch.stack([table(group) for table, group in zip(self.pos_embed, ids, strict=True)]).sum(0)
        return x + self.hook_pos_embed(positions.expand_as(x))

    def condition(self, tokens: Int[Tensor, "batch pos"],
                  t: Float[Tensor, "batch"] | float | None = None,
                  real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch d_cond"] | None:
        """The timestep embedding that adaLN reads, or None for a model without it."""
        if self.time_embed is None:
            return None
        if t is None:
            masked = tokens == self.config.mask_token_id
            t = masked.float().mean(1) if real is None else (masked & real).sum(1) / real.sum(1)
        t = torch.as_tensor(t, dtype=torch.float32, device=tokens.device).expand(len(tokens))
        kind = self.config.time_conditioning
        level = 1000 * t if kind == "t" else -torch.log1p(-t.clamp(max=1 - 1e-4)) if kind == "sigma" else 0 * t
        return self.time_embed(level)

    def begin(self, tokens: Int[Tensor, "batch pos"], condition: Float[Tensor, "batch d_cond"] | None = None,
              real: Bool[Tensor, "batch pos"] | None = None,
              ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
        """The state that enters the loops, H(0), and what input injection adds to it at each of them."""
        embedded = self.embed_tokens(tokens, real)
        x = self.head(embedded, condition, real)
        return x, self.injected(embedded, x)

    def injected(self, embedded: Float[Tensor, "batch pos d_model"],
                 x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What `loop` adds at each loop: ``embedded``, or the head's output ``x``, normalised and gated."""
        if self.config.input_injection != "head":
            return embedded
        normalise = F.layer_norm if self.config.norm == "layer" else F.rms_norm
        return self.injection_gate * normalise(x, (self.config.d_model,), eps=self.config.norm_eps)

    def head(self, x: Float[Tensor, "batch pos d_model"], condition: Float[Tensor, "batch d_cond"] | None = None,
             real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
        """The layers before the loop. Here and below, ``real`` positions are the ones that are attended to."""
        return self._layers(x, range(self.config.n_head_layers), condition, real)

    def loop(self, x: Float[Tensor, "batch pos d_model"], k: int, injected: Float[Tensor, "batch pos d_model"],
             condition: Float[Tensor, "batch d_cond"] | None = None,
             real: Bool[Tensor, "batch pos"] | None = None, *,
             step: Pass | None = None) -> Float[Tensor, "batch pos d_model"]:
        """One pass of the mid layers, as loop ``k``; ``injected`` (of `begin`) is what input injection adds.

        ``step`` runs other layers, or the same as another loop, while sites say ``@k``.
        """
        x = self.loop_input(x, k, injected, index=k if step is None else step.index)
        return self._layers(x, self._mid_layers() if step is None else step.layers, condition, real)

    def loop_input(self, x: Float[Tensor, "batch pos d_model"], k: int, injected: Float[Tensor, "batch pos d_model"], *,
                   index: int) -> Float[Tensor, "batch pos d_model"]:
        """What the first layer of loop ``k`` reads: the state, with injection and the embedding of loop ``index``."""
        config = self.config
        if self.clock.within is not None:
            self.clock.refuse_inside()
        self.clock.loop = k
        x = self.hook_loop_in(x)
        if config.input_injection != "none":
            x = x + self.hook_injection(injected)
        if config.loop_embedding == "learned":
            x = x + self.hook_loop_embed(self.loop_embed.weight[min(index, config.max_loops - 1)].expand_as(x))
        return x

    def tail(self, x: Float[Tensor, "batch pos d_model"], condition: Float[Tensor, "batch d_cond"] | None = None,
             real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos vocab"]:
        """The layers after the loop, and the unembedding."""
        return self.unembed(self.tail_layers(x, condition, real), condition)

    def tail_layers(self, x: Tensor, condition: Tensor | None = None,
                    real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
        """The layers after the loop alone."""
        return self._layers(x, range(self._mid_layers().stop, self.config.n_layers), condition, real)

    def unembed(self, x: Float[Tensor, "batch pos d_model"],
                condition: Float[Tensor, "batch d_cond"] | None = None) -> Float[Tensor, "batch pos vocab"]:
        """Final norm and unembedding: the logit lens of a residual-stream state."""
        x = self.ln_final(x)
        if self.final_ada is not None:
            shift, scale = self.final_ada(condition)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        weight = self.embed.weight if self.unembed_weight is None else self.unembed_weight
        return F.linear(x, weight, self.unembed_bias + self.mask_bias)

    def rotary(self, pos: int) -> Rotary | None:
        """cos and sin of the first ``pos`` positions, each [pos, d_head], in the precision and on the device of the
        weights; None for a model without rotary positions. They are made anew only where they would change."""
        if self.config.position == "learned":
            return None
        weight, tables, cut = self.embed.weight, self._rotary_tables, self._rotary_cut
        if tables is None or tables[0].dtype is not weight.dtype or tables[0].device != weight.device:
            with torch.inference_mode(False), torch.device("cpu"):  # to be differentiated through later, and exact
                cos, sin = rotary_tables(self.config.max_seq_len, self.config.d_head, self.config.rotary_base)
                self._rotary_tables = tables = cos.to(weight.device, weight.dtype), sin.to(weight.device, weight.dtype)
        if cut is None or cut[0] is not tables[0] or len(cut[1][0]) != pos:
            self._rotary_cut = cut = tables[0], (tables[0][:pos], tables[1][:pos])
        return cut[1]

    # ------------------------------------------------------- where it can be seen

    def site_space(self, n_loops: int | None = None) -> SiteSpace:
        """Every site that fires in a forward of ``n_loops`` loops."""
        if self.replans:
            return space_of(self.plan(n_loops), {name: point.looped for name, point in self.hook_points.items()})
        n_loops = self._checked_loops(n_loops)
        if n_loops not in self._spaces:
            self._spaces[n_loops] = SiteSpace({name: (("", n_loops),) if point.looped else ()
                                               for name, point in self.hook_points.items()})
        return self._spaces[n_loops]

    def plan(self, n_loops: int | None = None) -> Plan:
        """The passes of a forward of ``n_loops`` loops, under the edits that are in force."""
        plan = straight(self._checked_loops(n_loops), self._mid_layers())
        for replan in self.replans:
            plan = replan(plan)
        return plan

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model: forwards and hooks of other threads wait."""
        with self._lock:
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the model for one forward; RuntimeError if this thread is inside one already."""
        if not torch.compiler.is_compiling():
            self.clock.refuse_inside()  # before waiting: a backward pass may call its hooks from a thread of its own
        with self._lock, self.clock.forward():
            yield

    # ------------------------------------------------------------------ private

    def _point(self, name: str, looped: bool = False) -> HookPoint:
        self.hook_points[name] = HookPoint(name, self.clock, looped)
        return self.hook_points[name]

    def _block(self, layer: int) -> Block:
        looped = self.config.topology().is_looped(layer)
        return Block(self.config, layer, lambda name: self._point(name, looped))

    def _mid_layers(self) -> range:
        return range(self.config.n_head_layers, self.config.n_head_layers + self.config.n_loop_layers)

    def _layers(self, x: Tensor, layers: Sequence[int], condition: Tensor | None,
                real: Tensor | None = None) -> Tensor:
        rotary = self.rotary(x.shape[1])
        blocks = list(self.blocks)  # indexing a ModuleList costs more than the hook points do
        keys = None if real is None else real[:, None, None]
        for layer in layers:
            x = blocks[layer](x, rotary, condition, keys)
        return x

    def _checked_loops(self, n_loops: int | None) -> int:
        n_loops = self.config.max_loops if n_loops is None else n_loops
        if not isinstance(n_loops, int) or isinstance(n_loops, bool) or n_loops < 1:
            raise ValueError(f"n_loops must be a whole number of at least 1, not {n_loops!r}.")
        return n_loops

    def _entering(self, inputs: Tokens, n_loops: int | None,
                  attention_mask: AttentionMask) -> tuple[Tensor, int, Tensor | None]:
        """The tokens, the number of loops, and where tokens are real (None: everywhere), all checked."""
        given, attention_mask = take(inputs, attention_mask)
        tokens, n_loops = self._checked(given, n_loops)
        return tokens, n_loops, real_positions(tokens, attention_mask)

    def _checked(self, tokens: Tensor, n_loops: int | None) -> tuple[Tensor, int]:
        config = self.config
        if as_given(tokens).ndim != 2:
            raise ValueError(f"tokens must be [batch, pos], not of shape {tuple(tokens.shape)}; "
                             "a single sequence is tokens[None].")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
            raise ValueError(f"tokens must be integers, not {tokens.dtype}.")
        if not tokens.numel():
            raise ValueError(f"tokens of shape {list(tokens.shape)} hold nothing to run on: give at least one example "
                             "of at least one position.")
        if tokens.shape[1] > config.max_seq_len:
            raise ValueError(f"the sequence has {tokens.shape[1]} positions, the model takes at most "
                             f"{config.max_seq_len} (max_seq_len): cut it, or train a longer model.")
        if not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(tokens))
            if low < 0 or high >= config.vocab_size:
                raise ValueError(f"tokens hold the ids {low}..{high}, the vocabulary is 0..{config.vocab_size - 1}: "
                                 "they were encoded for another model.")
        return tokens, self._checked_loops(n_loops)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no lock of another model, and no edits: they are undone on the model they were made on."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {"replans": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
