"""The unrolled LoopMDM as a TransformerLens model: adapter and components for TransformerLens 4.3.

`unroll` (``model.unroll(n_loops)``) gives a `TransformerBridge` with one layer per depth, on which
TransformerLens' tools run as on any model. TransformerLens finds the architecture by itself, through
the entry-point group ``transformer_lens.architectures``; this module is imported only then, since
importing transformer_lens takes seconds.

    bridge = model.unroll(8)
    logits, cache = bridge.run_with_cache(tokens)
    cache.accumulated_resid(apply_ln=True)            # [depth, batch, pos, d_model]

Three things differ from TransformerLens' defaults, each in the model's favour. ``hook_resid_mid``
edits the residual stream, where a bridge's usual alias edits only what the MLP reads. The final
norm's learned scale is part of ``W_U``, as if folded, so that logit attributions sum to the logits
although no weight was processed. And without hooks on scores or patterns, attention runs fused.
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    PositionEmbeddingsAttentionBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from hooks.bridges.unroll import LoopEntry, UnrolledAttention, UnrolledLoopMDM
from hooks.bridges.weight_views import Readout
from hooks.model.config import LoopMDMConfig
from hooks.model.layers import Rotary
from hooks.model.loopmdm import LoopMDM

ARCHITECTURE = "LoopMDMForMaskedLM"


def unroll(model: LoopMDM, n_loops: int | None = None, *, t: float | None = None) -> TransformerBridge:
    """``model`` at ``n_loops`` loops (default max_loops) as a TransformerLens bridge that shares its parameters.

    ``cfg.n_layers`` is the unrolled depth, n_head + n_loops · n_mid + n_tail. ``t`` in (0, 1] fixes the
    noise level of a model conditioned on time, which the readout tools (logit lens, logit attributions)
    need; without it ``bridge(tokens, t=...)`` takes one per forward.
    """
    register()
    unrolled = UnrolledLoopMDM(model, n_loops, t=t)
    return build_bridge_from_module(unrolled, ARCHITECTURE, tl_config=bridge_config(model.config, unrolled.n_loops),
                                    model_name="loopmdm")


def register() -> None:
    """Make the architecture known to TransformerLens, if its entry point has not done so already.

    Also names it in the two tables that ``boot_transformers`` consults, which in TransformerLens 4.3
    do not learn of architectures that arrive through an entry point.
    """
    from transformer_lens.utilities.architectures import MASKED_LM_ARCHITECTURES

    factory = architecture_adapter_factory.ArchitectureAdapterFactory
    factory.discover_entry_points()  # first: it warns about names that are already taken
    if ARCHITECTURE not in factory._adapters:
        factory.register_adapter(ARCHITECTURE, LoopMDMArchitectureAdapter)
    architecture_adapter_factory.SUPPORTED_ARCHITECTURES.setdefault(ARCHITECTURE, LoopMDMArchitectureAdapter)
    MASKED_LM_ARCHITECTURES.add(ARCHITECTURE)


def bridge_config(config: LoopMDMConfig, n_loops: int) -> TransformerBridgeConfig:
    """TransformerLens' configuration of the unrolled network."""
    return TransformerBridgeConfig(
        architecture=ARCHITECTURE, d_model=config.d_model, n_heads=config.n_heads, d_head=config.d_head,
        n_layers=config.topology(n_loops).depth, n_ctx=config.max_seq_len, d_vocab=config.vocab_size,
        d_mlp=config.d_mlp, eps=config.norm_eps, act_fn="silu" if config.mlp == "swiglu" else "gelu_new",
        gated_mlp=config.mlp == "swiglu", normalization_type="RMS" if config.norm == "rms" else "LN",
        positional_embedding_type="standard" if config.position == "learned" else "rotary",
        rotary_base=int(config.rotary_base), attention_dir="bidirectional", use_qk_norm=config.qk_norm,
        tie_word_embeddings=config.tie_embeddings, tokenizer_prepends_bos=False, default_prepend_bos=False)


class LoopMDMArchitectureAdapter(ArchitectureAdapter):
    """Maps an `UnrolledLoopMDM`, or a transformers model that holds one, to TransformerLens components."""

    supports_generation = False          # sampling is denoising, hooks.model.diffusion, not left to right
    supports_causal_loss = False
    supports_kv_cache = False
    supports_hf_output_attentions = False
    native_sampler = None

    @property  # TransformerLens has a plain attribute here; reading it is where a refusal can say why
    def supports_compatibility_mode(self) -> bool:  # type: ignore[override]
        raise ValueError("compatibility mode rewrites weights (fold_ln, centring), and these weights are shared: one "
                         "layer of the looped model serves every loop. The bridge is complete without it: W_U already "
                         "holds the final norm's scale.")

    def prepare_model(self, model: Any) -> None:
        """Unroll a transformers wrapper in place, then map whatever is to be bridged."""
        prefix = ""
        unrolled = model
        if not isinstance(model, UnrolledLoopMDM):
            topology = model.model.config.topology(1)
            n_loops, rest = divmod(self.cfg.n_layers - topology.n_head - topology.n_tail, topology.n_mid)
            if rest or n_loops < 1:
                raise ValueError(f"num_hidden_layers={self.cfg.n_layers} is not the depth of this model for any number "
                                 f"of loops: it is {topology.n_head + topology.n_tail} + {topology.n_mid} per loop.")
            model.unrolled = unrolled = UnrolledLoopMDM(model.model, n_loops)
            prefix = "unrolled."
        self._configure(unrolled.looped.config, unrolled.n_loops)
        self.component_mapping = self._mapping(unrolled, prefix)

    def preprocess_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        _ = self.supports_compatibility_mode  # raises: weight processing would untie the loops
        return state_dict

    # ------------------------------------------------------------------ private

    def _configure(self, config: LoopMDMConfig, n_loops: int) -> None:
        wanted = bridge_config(config, n_loops)
        for name in ("d_model", "n_heads", "d_head", "n_layers", "n_ctx", "d_vocab", "d_mlp", "eps", "act_fn",
                     "gated_mlp", "normalization_type", "positional_embedding_type", "rotary_base", "attention_dir",
                     "use_qk_norm", "tie_word_embeddings", "tokenizer_prepends_bos", "default_prepend_bos"):
            setattr(self.cfg, name, getattr(wanted, name))
        self.cfg.d_vocab_out = wanted.d_vocab

    def _mapping(self, unrolled: UnrolledLoopMDM, prefix: str) -> dict[str, GeneralizedComponent]:
        cfg, config = self.cfg, unrolled.looped.config
        mapping: dict[str, GeneralizedComponent] = {"embed": EmbeddingBridge(name=f"{prefix}tok_embed")}
        if config.position != "rotary":
            mapping["pos_embed"] = PosEmbedBridge(name=f"{prefix}pos")
        mapping["loop_entries"] = LoopEntryBridge(f"{prefix}entries", config)
        mapping["blocks"] = self._block(unrolled, f"{prefix}layers")
        mapping["ln_final"] = LoopNormBridge(f"{prefix}ln_out", cfg)
        mapping["unembed"] = ReadoutBridge(name=f"{prefix}head")
        return mapping

    def _block(self, unrolled: UnrolledLoopMDM, name: str) -> BlockBridge:
        cfg, config = self.cfg, unrolled.looped.config
        parts: dict[str, GeneralizedComponent] = {
            "ln1": LoopNormBridge("ln1", cfg),
            "attn": LoopAttentionBridge(cfg, rotary=config.position != "learned"),
            "resid_mid": GeneralizedComponent("resid_mid"),
            "ln2": LoopNormBridge("ln2", cfg),
        }
        linears: dict[str, GeneralizedComponent] = {"in": LinearBridge("fc_in"), "out": LinearBridge("fc_out")}
        if config.mlp == "swiglu":
            linears = {"gate": LinearBridge("fc_gate"), **linears}
            parts["mlp"] = LoopGatedMLPBridge("mlp", config=cfg, submodules=linears)
        else:
            parts["mlp"] = LoopMLPBridge("mlp", config=cfg, submodules=linears)
        aliases = {"hook_resid_mid": "resid_mid.hook_out"}
        if unrolled.layers[0].gated:
            parts |= {gate: GeneralizedComponent(gate) for gate in ("attn_gate", "mlp_gate")}
            aliases |= {"hook_attn_out": "attn_gate.hook_out", "hook_mlp_out": "mlp_gate.hook_out"}
        return BlockBridge(name, config=cfg, submodules=parts, hook_alias_overrides=aliases)


class LoopNormBridge(NormalizationBridge):
    """The fused norm, unless somebody looks inside it."""

    def __init__(self, name: str, config: Any):
        super().__init__(name, config, submodules={}, uses_rms_norm=config.normalization_type == "RMS")

    def forward(self, hidden_states: Float[Tensor, "... d_model"], **kwargs: Any) -> Float[Tensor, "... d_model"]:
        hidden_states = self.hook_in(hidden_states)
        if _hooked(self.hook_scale) or _hooked(self.hook_normalized):
            return self.hook_out(self._python_norm_forward(hidden_states))
        assert self.original_component is not None
        return self.hook_out(self.original_component(hidden_states))


class LoopAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Bidirectional attention with all of TransformerLens' attention hooks, split inputs included."""

    def __init__(self, config: Any, rotary: bool):
        super().__init__("attn", config, submodules={x: LinearBridge(x) for x in ("q", "k", "v", "o")}, is_causal=False)
        never = ["hook_hidden_states"] + ([] if rotary else ["hook_cos", "hook_sin"])
        for name in never:  # a hook point that cannot fire is a trap: take it away
            delattr(self, name)
            self._hook_registry.pop(name)
        for name in ("hook_rot_q", "hook_rot_k"):  # what the scores are made of, also without rotation
            if not hasattr(self, name):
                setattr(self, name, HookPoint())
        self._modulation: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"], rotary: Rotary | None = None,
                modulation: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "batch pos d_model"]:
        core = self.original_component
        assert isinstance(core, UnrolledAttention)
        assert self.config is not None
        n_heads, d_head = core.n_heads, core.head_dim
        hidden_states = self.hook_in(hidden_states)
        batch, pos, _ = hidden_states.shape
        if rotary is not None:
            rotary = self._apply_position_embedding_hooks(rotary)
        self._modulation = modulation
        try:
            q, k, v = (self._split(hidden_states, n_heads, d_head) if self._splits() else
                       [linear(hidden_states).view(batch, pos, n_heads, d_head) for linear in (self.q, self.k, self.v)])
        finally:
            self._modulation = self._captured_pre_ln_residual = None
        q, k = core.turned(q, k, rotary)
        q, k, v = self.hook_rot_q(q), self.hook_rot_k(k), v.transpose(1, 2)
        if _hooked(self.hook_attn_scores) or _hooked(self.hook_pattern):
            z = self.hook_pattern(self.hook_attn_scores(core.scores(q, k)).softmax(-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        z = z.transpose(1, 2).reshape(batch, pos, n_heads * d_head)
        if self.config.use_attn_result:
            z = self.o.hook_in(z).view(batch, pos, n_heads, d_head)
            return self.hook_out(self._compute_per_head_result(z, n_heads, d_head))
        return self.hook_out(self.o(z))

    def _splits(self) -> bool:
        assert self.config is not None
        return bool(self.config.use_split_qkv_input or self.config.use_attn_in)

    def _split(self, hidden_states: Tensor, n_heads: int, d_head: int) -> list[Tensor]:
        """One copy of the residual stream per head, and per queries, keys and values if asked."""
        assert self.config is not None
        captured = self._captured_pre_ln_residual
        source = hidden_states if captured is None else captured
        if self.config.use_split_qkv_input:
            forks = [self._fork_and_norm_per_head(source, hook, n_heads)
                     for hook in (self.hook_q_input, self.hook_k_input, self.hook_v_input)]
        else:
            forks = [self._fork_and_norm_per_head(source, self.hook_attn_in, n_heads)] * 3
        return [self._project_per_head_qkv(linear, fork, n_heads, d_head)
                for linear, fork in zip((self.q, self.k, self.v), forks, strict=True)]

    def _apply_ln1_per_head(self, x: Float[Tensor, "batch pos head d_model"],
                            ) -> Float[Tensor, "batch pos head d_model"]:
        x = super()._apply_ln1_per_head(x)
        if self._modulation is None:
            return x
        shift, scale = self._modulation  # of adaLN, [batch or 1, 1, d_model]
        return x * (1 + scale[:, :, None]) + shift[:, :, None]


class _LiveBiases:
    """Biases read when asked for: TransformerLens keeps the tensors of its first look."""

    out: Any

    @property
    def b_in(self) -> Tensor | None:
        return getattr(self, "in").bias

    @property
    def b_out(self) -> Tensor | None:
        return self.out.bias


# The aliases below are class variables, which TransformerLens declares as if they were an instance's.


class LoopMLPBridge(_LiveBiases, MLPBridge):
    property_aliases: ClassVar[dict[str, str]] = {}  # type: ignore[misc]


class LoopGatedMLPBridge(_LiveBiases, GatedMLPBridge):
    property_aliases: ClassVar[dict[str, str]] = {}  # type: ignore[misc]


class LoopEntryBridge(GeneralizedComponent):
    """``loop_entries.k.hook_loop_in``, ``hook_injection`` and ``hook_loop_embed``: where loop k begins."""

    is_list_item = True
    hook_aliases: ClassVar[dict[str, str | list[str]]] = {"hook_loop_in": "hook_in"}  # type: ignore[misc]

    def __init__(self, name: str, config: LoopMDMConfig):
        super().__init__(name)
        if config.input_injection != "none":
            self.hook_injection = HookPoint()
        if config.loop_embedding == "learned":
            self.hook_loop_embed = HookPoint()

    def set_original_component(self, original_component: Any) -> None:
        super().set_original_component(original_component)
        self.is_list_item = False  # one per loop, but no layer: TransformerLens counts lists of list items as blocks

    # TransformerLens' components take any arguments; this one takes the two that a loop entry needs.
    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"],  # type: ignore[override]
                injected: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        entry = self.original_component
        assert isinstance(entry, LoopEntry)
        hooks = {name: self._modules[f"hook_{name}"] for name in ("injection", "loop_embed")
                 if f"hook_{name}" in self._modules}
        return self.hook_out(entry(self.hook_in(hidden_states), injected, **hooks))


class ReadoutBridge(UnembeddingBridge):
    """Unembedding; ``unembed.hook_normalized`` is the looped model's ``ln_final.hook_normalized``."""

    def __init__(self, name: str):
        super().__init__(name)
        self.hook_normalized = HookPoint()

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"],
                **kwargs: Any) -> Float[Tensor, "batch pos vocab"]:
        readout = self.original_component
        assert isinstance(readout, Readout)
        gained = self.hook_normalized(readout.gained(self.hook_in(hidden_states)))
        return self.hook_out(readout.project(gained, **kwargs))


def _hooked(point: Any) -> bool:
    """Is anything attached, by TransformerLens or (`hooks.watch`) by torch?"""
    return bool(point.has_hooks("both") or point._forward_hooks or point._forward_pre_hooks)
