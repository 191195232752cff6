"""LoopMDM among transformers' Auto classes: a configuration and a masked-LM wrapper.

Importing this module registers both, so that those who work with transformers load a zoo folder as
they load anything else, and TransformerLens boots it. The wrapper adds nothing to the model: it holds
a `HookedLoopMDM` as ``.model``, reads and writes the same folders, and only renames the arguments.

    import hooks.bridges.hf
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained("zoo/automaton-loop")
    logits = model(input_ids, n_loops=8).logits
    model.model.run_with_cache(input_ids)                   # the HookedLoopMDM
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from hooks.model.config import FOR_TRANSFORMERS, LoopMDMConfig
from hooks.model.hooked import HookedLoopMDM


class LoopMDMPretrainedConfig(PretrainedConfig):
    """`LoopMDMConfig` as transformers keeps it, with transformers' names for what others look up.

    ``num_hidden_layers`` is the unrolled depth at ``max_loops``; everything else is under its own name.
    """

    model_type = FOR_TRANSFORMERS["model_type"]

    def __init__(self, **values: Any):
        known = {f.name for f in fields(LoopMDMConfig)}
        own = {key: values.pop(key) for key in known & set(values)}
        values.setdefault("architectures", list(FOR_TRANSFORMERS["architectures"]))
        values["tie_word_embeddings"] = False  # the model ties its own weights, in LoopMDM.unembed
        depth = values.pop("num_hidden_layers", None)
        for derived in ("hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
            values.pop(derived, None)
        super().__init__(**values)
        if own:  # transformers builds one without arguments, to compare with
            config = LoopMDMConfig.from_dict(own)
            for key, value in config.to_dict().items():
                setattr(self, key, value)
            self.hidden_size, self.num_attention_heads = config.d_model, config.n_heads
            self.intermediate_size, self.max_position_embeddings = config.d_mlp, config.max_seq_len
            self.num_hidden_layers = config.topology().depth if depth is None else depth

    def to_loopmdm(self) -> LoopMDMConfig:
        return LoopMDMConfig.from_dict({f.name: getattr(self, f.name) for f in fields(LoopMDMConfig)})


class LoopMDMForMaskedLM(PreTrainedModel):
    """A LoopMDM that takes transformers' arguments and gives a `MaskedLMOutput`."""

    config_class = LoopMDMPretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: LoopMDMPretrainedConfig):
        super().__init__(config)
        self.model = HookedLoopMDM(config.to_loopmdm())
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: LoopMDM initialises itself."""

    def forward(self, input_ids: Int[Tensor, "batch pos"] | None = None, attention_mask: Tensor | None = None, *,
                n_loops: int | None = None, t: Float[Tensor, "batch"] | float | None = None,
                labels: Int[Tensor, "batch pos"] | None = None, return_dict: bool | None = None,
                inputs_embeds: Tensor | None = None) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits [batch, pos, vocab]; with ``labels`` (−100: not counted) also their mean cross-entropy.

        That loss is transformers' own for masked models; the objective a LoopMDM is trained on weights
        it by 1/t: `hooks.model.diffusion`. ``attention_mask`` [batch, pos] is 0 at padding. Once TransformerLens has
        wrapped the model, it runs unrolled at the number of loops for which it was wrapped, and takes no padding.
        """
        unrolled = getattr(self, "unrolled", None)
        if unrolled is not None:
            if n_loops not in (None, unrolled.n_loops):
                raise ValueError(f"this model was unrolled to {unrolled.n_loops} loops and runs only those; "
                                 "load it again for another number.")
            logits = unrolled(input_ids, t=t, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        else:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("a LoopMDM takes tokens: pass input_ids, not inputs_embeds.")
            logits = self.model(input_ids, n_loops, t=t, attention_mask=attention_mask)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)

    # Narrower than transformers' signatures on purpose: one file, one format, our own checks on it.
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any,  # type: ignore[override]
                        config: LoopMDMPretrainedConfig | None = None, dtype: Any = None, torch_dtype: Any = None,
                        **kwargs: Any) -> LoopMDMForMaskedLM:
        """A folder or a hub id, read by `HookedLoopMDM.from_pretrained`, with its checks and its messages.

        ``dtype`` (a torch.dtype or its name) is that of the weights, by default float32.
        """
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "force_download", "local_files_only", "token")
               if key in kwargs}
        loaded = HookedLoopMDM.from_pretrained(pretrained_model_name_or_path, **hub)
        wrapped = cls(config or LoopMDMPretrainedConfig(**loaded.config.to_dict()))
        wrapped.model = loaded
        wanted = dtype if dtype is not None else torch_dtype
        if wanted is not None:
            wrapped.model.to(_precision(wanted))
        return wrapped.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """The same folder that `HookedLoopMDM.save_pretrained` writes."""
        if getattr(self, "unrolled", None) is not None:
            raise ValueError("TransformerLens has taken this model apart: save the one it was made from.")
        self.model.save_pretrained(save_directory)


def _precision(dtype: Any) -> torch.dtype:
    """A dtype, given as such or by its name, as transformers takes it."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype or its name, not {dtype!r}; "
                         "by default a model is loaded in float32.")
    return found


def _register_auto_classes() -> None:
    """Make transformers' Auto classes know LoopMDM. Importing this module does so."""
    AutoConfig.register(LoopMDMPretrainedConfig.model_type, LoopMDMPretrainedConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForMaskedLM):
        auto.register(LoopMDMPretrainedConfig, LoopMDMForMaskedLM, exist_ok=True)


_register_auto_classes()
