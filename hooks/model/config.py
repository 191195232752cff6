"""The configuration of a LoopMDM: everything that shapes it, checked where it is made.

    LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=96, n_loop_layers=2, max_loops=8)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hooks.topology import Topology

FOR_TRANSFORMERS: dict[str, Any] = {"model_type": "loopmdm", "architectures": ["LoopMDMForMaskedLM"]}
"""What a config.json says besides, so that transformers' Auto classes recognise the folder (`hooks.bridges.hf`)."""


@dataclass(frozen=True)
class LoopMDMConfig:
    """Everything that shapes a LoopMDM. Illegal combinations raise ValueError here."""

    vocab_size: int                  # number of tokens, the mask included
    mask_token_id: int               # which of them is the mask
    max_seq_len: int                 # longest sequence the model accepts
    d_model: int = 64                # width of the residual stream
    n_heads: int = 4                 # attention heads; must divide d_model
    d_mlp: int = 256                 # hidden width of the MLP
    n_head_layers: int = 1           # layers before the loop, run once
    n_loop_layers: int = 2           # looped layers, sharing weights over loops
    n_tail_layers: int = 1           # layers after the loop, run once
    max_loops: int = 8               # S_max: training draws S from 1..S_max; 1 is an unlooped model
    position: Literal["rotary", "learned", "both"] = "rotary"
    rotary_base: float = 10_000.0    # base of the rotary wavelengths
    position_groups: tuple[tuple[int, ...], ...] = ()  # learned positions as a sum of tables, each
    #                                  indexed by one group id per position (row, column, box); () = one per position
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    qk_norm: bool = True             # RMS-normalise queries and keys per head
    mlp: Literal["gelu", "swiglu"] = "gelu"
    time_conditioning: Literal["none", "t", "sigma", "constant"] = "none"  # adaLN on t, on −log(1−t), on 0
    d_cond: int = 128                # width of the timestep embedding, where there is one
    input_injection: Literal["none", "add", "head"] = "none"  # added to the state at each loop: the token embedding
    #                                  (R-MDM, 2606.18022), or the head's output, normalised and times a learned gate
    #                                  per channel that starts at 0, so that training starts as without it (after
    #                                  2610.06833 and 2604.12946); the embedding of every masked token is the same
    loop_embedding: Literal["none", "learned"] = "none"  # add a vector per loop index (the last one beyond S_max)
    tie_embeddings: bool = False     # unembed with the embedding's transpose

    def __post_init__(self) -> None:
        for field in ("vocab_size", "max_seq_len", "d_model", "n_heads", "d_mlp", "n_loop_layers", "max_loops"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}.")
        for field in ("n_head_layers", "n_tail_layers"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, not {getattr(self, field)}.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary 0..{self.vocab_size - 1}; "
                             "vocab_size counts the mask token too.")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}.")
        if self.position != "learned" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head width; d_model / n_heads is {self.d_head}.")
        for field, allowed in (("position", ("rotary", "learned", "both")), ("norm", ("rms", "layer")),
                               ("mlp", ("gelu", "swiglu")), ("input_injection", ("none", "add", "head")),
                               ("loop_embedding", ("none", "learned")),
                               ("time_conditioning", ("none", "t", "sigma", "constant"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}.")
        if any(len(group) != self.max_seq_len for group in self.position_groups):
            raise ValueError(f"each of position_groups needs one id per position, {self.max_seq_len} in all.")
        if self.position_groups and self.position == "rotary":
            raise ValueError("position_groups are learned positions: set position='learned' or 'both'.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopMDMConfig:
        """Build from JSON. Raises ValueError for unknown or missing keys, naming them."""
        values = {key: value for key, value in values.items() if FOR_TRANSFORMERS.get(key) != value}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration keys {unknown}; known ones are {sorted(known)}.")
        if missing := sorted({"vocab_size", "mask_token_id", "max_seq_len"} - set(values)):
            raise ValueError(f"configuration keys {missing} are missing.")
        groups = tuple(tuple(group) for group in values.get("position_groups", ()))
        return cls(**{**values, "position_groups": groups})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_layers(self) -> int:
        """Physical layers, n_head + n_loop + n_tail."""
        return self.n_head_layers + self.n_loop_layers + self.n_tail_layers

    @property
    def conditioned(self) -> bool:
        return self.time_conditioning != "none"

    def topology(self, n_loops: int | None = None) -> Topology:
        """The unrolled layout for ``n_loops`` loops (default: max_loops)."""
        return Topology(self.n_head_layers, self.n_loop_layers, self.n_tail_layers,
                        self.max_loops if n_loops is None else n_loops)
