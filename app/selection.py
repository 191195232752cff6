"""What every page looks at: a model, an example, a mask, a number of loops; kept in the URL.

The sidebar's controls are bound to query parameters, so that a link reopens what it was
copied from, and the choice stays when the page changes. The mask is either drawn from a
noise level t or by hand, cell by cell; a mask drawn by hand is a hexadecimal number.

    scene = choose()                     # draws the sidebar
    scene.noised, scene.n_loops          # what to feed the model
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import streamlit as st
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from app import data, show
from app.data import Checkpoint
from hooks.model.diffusion import T_MIN, corrupt
from studies.tasks import Batch, Task
from studies.zoo import Entry

MAX_LOOPS = 24
"""Most loops the explorer offers."""
BY_LEVEL, BY_HAND = "noise level", "by hand"


@dataclass(frozen=True)
class Scene:
    """One choice of everything a page needs; tensors are on the CPU, [pos] or [example, pos]."""

    name: str
    checkpoint: Checkpoint
    entry: Entry
    example: int
    n_loops: int
    batch: Batch                       # the held-out examples on offer
    hidden: Bool[Tensor, "pos"]        # which positions of the example are masked
    by_hand: bool
    level: float                       # the noise level that was set (kept while drawing by hand)
    draw: int                          # seed of the mask

    @property
    def task(self) -> Task:
        return self.entry.task

    @property
    def tokens(self) -> Int[Tensor, "pos"]:
        return self.batch.tokens[self.example]

    @property
    def free(self) -> Bool[Tensor, "pos"]:
        return self.batch.free[self.example]

    @property
    def noised(self) -> Int[Tensor, "pos"]:
        return self.tokens.masked_fill(self.hidden, self.task.mask_token_id)

    @property
    def t(self) -> float:
        """The noise level the model is told: the share of free positions that is masked."""
        return max(T_MIN, float(self.hidden.sum() / self.free.sum().clamp_min(1)))

    @property
    def looped(self) -> bool:
        return self.entry.model.config.max_loops > 1

    def crowd(self, n: int) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"]]:
        """(clean, noised) of ``n`` held-out examples under the same kind of mask, for averages."""
        batch = self.batch if n <= len(self.batch.tokens) else data.examples(self.checkpoint, n)
        tokens, free = batch.tokens[:n], batch.free[:n]
        if self.by_hand:
            return tokens, tokens.masked_fill(self.hidden & free, self.task.mask_token_id)
        generator = torch.Generator().manual_seed(self.draw)
        return tokens, corrupt(tokens, self.level, self.task.mask_token_id, free=free, generator=generator)


def choose() -> Scene:
    """The sidebar's controls; stops the page with a message if the zoo is empty or damaged."""
    available = data.checkpoints()
    show.problems(data.zoo_problems())
    if not available:
        st.error(f"No models in {data.zoo_folder()}. Train the bundled triplet with "
                 "`python studies/pretrain.py --preset automaton`, or point LOOPSCOPE_ZOO to a zoo.",
                 icon=":material/folder_off:")
        st.stop()
    with st.sidebar:
        name = st.selectbox("Model", list(available), key="model", bind="query-params", on_change=_to_its_loops,
                            help="Folders of the zoo. A *twin* has the LoopMDM's parameters and no loops; the "
                                 "*deep* twin has its mean compute.")
        checkpoint = available[name]
        entry = _loaded(checkpoint)
        st.caption(data.model_in_words(checkpoint))
        trained = entry.model.config.max_loops
        n_loops = st.slider("Loops S", 1, MAX_LOOPS, _default_loops(entry), key="loops", bind="query-params",
                            help="How often the mid layers run. Any number works, also beyond those of training.")
        if n_loops > trained:
            st.caption(f":orange[:material/trending_up:] beyond training, which had S ≤ {trained}"
                       if trained > 1 else ":orange[:material/info:] this model was trained with its layers run once")
        batch = _examples(checkpoint)
        example = int(st.number_input("Example", 0, len(batch.tokens) - 1, 0, key="example", bind="query-params",
                                      help=f"One of {len(batch.tokens)} examples held out from training."))
        masking = st.segmented_control("Mask", [BY_LEVEL, BY_HAND], default=BY_LEVEL, required=True, key="masking",
                                       bind="query-params")
        level, draw = st.session_state.get("_level", 1.0), st.session_state.get("_draw", 0)
        if masking == BY_LEVEL:
            level = st.slider("Noise level t", 0.05, 1.0, 1.0, 0.05, key="t", bind="query-params",
                              help="Each free position is masked with this probability; 1 masks them all.")
            draw = int(st.number_input("Mask seed", 0, 999, 0, key="draw", bind="query-params"))
            st.session_state["_level"], st.session_state["_draw"] = level, draw   # a drawing starts from them
            st.query_params.pop("mask", None)
        hidden = _from_level(batch, example, level, draw)
        if masking == BY_HAND:
            hidden = _drawn(batch.free[example], hidden)
        st.caption(f"{int(hidden.sum())} of {int(batch.free[example].sum())} free positions masked")
    return Scene(name, checkpoint, entry, example, n_loops, batch, hidden, masking == BY_HAND, level, draw)


def flip(scene: Scene, positions: list[int]) -> None:
    """Mask what is visible and show what is masked, at the free ones of ``positions``; then drawn by hand."""
    hidden = scene.hidden.clone()
    for pos in positions:
        if scene.free[pos]:
            hidden[pos] = ~hidden[pos]
    draw_mask(hidden)


def draw_mask(hidden: Bool[Tensor, "pos"]) -> None:
    """Set the mask drawn by hand. To be called from a callback, before the controls exist."""
    st.session_state["masking"] = BY_HAND
    st.session_state["_mask"] = encode_mask(hidden)


def encode_mask(hidden: Bool[Tensor, "pos"]) -> str:
    """Four positions per hexadecimal digit, the first position in the highest bit; zeros fill the last digit."""
    bits = "".join("1" if bit else "0" for bit in hidden.tolist())
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def decode_mask(text: str, n: int) -> Bool[Tensor, "pos"]:
    """The inverse of `encode_mask` for ``n`` positions. ValueError says what does not fit."""
    digits = -(-n // 4)
    if len(text) != digits or set(text) - set("0123456789abcdef"):
        raise ValueError(f"a mask for {n} positions is {digits} hexadecimal digits (0-9, a-f), not {text!r}.")
    bits = f"{int(text, 16):0{4 * digits}b}"
    return torch.tensor([bit == "1" for bit in bits[:n]])


# ---------------------------------------------------------------------- private

def _loaded(checkpoint: Checkpoint) -> Entry:
    try:
        return data.load_entry(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        _refused(f"This model cannot be loaded: {error}")


def _examples(checkpoint: Checkpoint) -> Batch:
    try:
        return data.examples(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        _refused(f"The examples of this model's task cannot be made: {checkpoint.path}/card.json: {error}")


def _refused(why: str) -> NoReturn:
    """In the page, not in the sidebar, where another model can still be chosen."""
    st.error(why, icon=":material/broken_image:")
    st.stop()


def _default_loops(entry: Entry) -> int:
    return min(entry.model.config.max_loops, MAX_LOOPS)


def _to_its_loops() -> None:
    """Another model starts at the loops it was trained for."""
    checkpoint = data.checkpoints().get(st.session_state["model"])
    if checkpoint is None:
        return
    try:
        st.session_state["loops"] = _default_loops(data.load_entry(checkpoint))
    except (FileNotFoundError, ValueError):   # the page says why
        return


def _from_level(batch: Batch, example: int, level: float, draw: int) -> Bool[Tensor, "pos"]:
    """The mask of one example: the same draw for every model and number of loops."""
    generator = torch.Generator().manual_seed(draw)
    noised = corrupt(torch.zeros_like(batch.tokens), level, 1, free=batch.free, generator=generator)
    return noised[example] == 1


def _typed() -> None:
    st.session_state["_mask"] = st.session_state["mask"]


def _drawn(free: Bool[Tensor, "pos"], start: Bool[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """The mask drawn by hand, starting from the one of the noise level.

    A bound control would not put a value set by a click into the address, so this one is kept there by hand;
    ``_mask`` is what counts, since the control's own value goes when a page does not show it.
    """
    st.session_state["mask"] = st.session_state.setdefault("_mask", st.query_params.get("mask", ""))
    text = st.text_input("Mask as a number", key="mask", placeholder=encode_mask(start), on_change=_typed,
                         help="The mask in hexadecimal, four positions per digit. Draw it on the Lens page by "
                              "clicking cells, or paste one here.")
    if not text:
        st.query_params.pop("mask", None)
        return start
    st.query_params["mask"] = text
    try:
        return decode_mask(text.strip().lower(), len(free)) & free
    except ValueError as error:
        st.warning(f"This is not a mask: {error} Showing the mask of the noise level.")
        return start
