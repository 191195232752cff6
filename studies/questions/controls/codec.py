"""Codecs: looped blocks that are built to run a given sequence of operations, with shared weights and no loop index.

One block is trained, from states that nothing but the code of some bits and a clock vector make up, to write the
code of the bits after an operation and the next clock:

    code_k(y) + clock_k + noise  →  code_(k+1)(op_k(y)) + clock_(k+1)

It has no memory and sees no input, so that loop k computes operation k and cannot do otherwise. The truth of the
control is its sequence: the codec "ABAB" alternates between two operations although its weights are shared.

    made = codec("ABAB", n_layers=2, width=64, bits=12, seed=0)
    stage_test(made.model(), made.inputs(64, seed=1), targets=made.targets(64, seed=1))
    made.truth                                                # "ABAB"
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks import LoopedModel, adopt
from studies.questions.controls.operations import OPERATIONS, Operation

Arrangement = Literal["vector", "positions"]
"""All bits in one vector at a single position (an MLP works on it), or a bit at each position (attention too)."""


class CodecFailed(RuntimeError):
    """Training did not reach a block that runs its sequence without an error."""


@dataclass(frozen=True)
class CodecConfig:
    """What a codec is and how it is trained."""

    sequence: str                       # a letter per loop
    n_layers: int = 2                   # layers of the shared block
    width: int = 64                     # d_model
    bits: int = 12                      # bits of the content
    noise: float = 0.8                  # standard deviation of the noise on training states, in units of a code's rms:
    #                                     the truth is to hold beside the exact codes too, where a clock that was
    #                                     estimated from few examples puts them (at 0.1, τ of AAAA is 0.5 to 1 there)
    turned: bool = False                # the code is turned by a random rotation at every place
    arrangement: Arrangement = "vector"
    n_heads: int = 4                    # attention heads, where bits have positions
    d_mlp: int = 256                    # hidden width of the MLPs
    steps: int = 8000                   # longest training
    batch_size: int = 512               # examples per training step
    lr: float = 2e-3
    target: float = 1.0                 # share of bits that must be right at the end of the sequence
    seed: int = 0                       # of codes, clocks, weights and training data

    def __post_init__(self) -> None:
        if len(self.sequence) < 2:
            raise ValueError(f"a sequence has a letter per loop and at least two, not {self.sequence!r}.")
        if self.arrangement == "positions" and self.width % self.n_heads:
            raise ValueError(f"width {self.width} is not a multiple of n_heads {self.n_heads}.")
        if self.arrangement == "vector" and self.width < self.bits + 2:
            raise ValueError(f"{self.bits} bits and a clock need a width of at least {self.bits + 2}, not "
                             f"{self.width}.")


class MLPLayer(nn.Module):
    """x + MLP(norm(x))."""

    def __init__(self, width: int, d_mlp: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, d_mlp), nn.Linear(d_mlp, width)

    def forward(self, x: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example pos d_model"]:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Codec(nn.Module):
    """A block ``layers`` that is run once per letter, and the codes and clocks of its places."""

    codes: Float[Tensor, "place bit d_model"]
    clocks: Float[Tensor, "place d_model"]
    base: Float[Tensor, "place pos d_model"]
    noise_basis: Float[Tensor, "d_model d_model"]

    def __init__(self, config: CodecConfig, operations: Mapping[str, Operation]):
        super().__init__()
        if missing := sorted(set(config.sequence) - set(operations)):
            raise ValueError(f"no operations for the letters {missing}; there are {sorted(operations)}.")
        self.config = config
        self.clock_noise = 0.0              # in units of the standard deviation of a clock's numbers
        self.operations = tuple(operations[letter] for letter in config.sequence)
        generator = torch.Generator().manual_seed(config.seed)
        n_places, width = len(config.sequence) + 1, config.width

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        alone = config.arrangement == "vector"
        directions = torch.linalg.qr(normal(width, width)).Q[:, :config.bits if alone else 1].T
        turns = torch.stack([torch.linalg.qr(normal(width, width)).Q if config.turned else torch.eye(width)
                             for _ in range(n_places)])
        where = torch.zeros(1, width) if alone else normal(config.bits, width) * 0.5
        self.register_buffer("codes", torch.einsum("bd,ped->pbe", directions * (width / len(directions)) ** 0.5, turns))
        self.register_buffer("base", torch.einsum("xd,ped->pxe", where, turns))
        self.register_buffer("clocks", normal(n_places, width))
        self.register_buffer("noise_basis", normal(width, width), persistent=False)
        if alone:
            self.layers: nn.ModuleList = nn.ModuleList(MLPLayer(width, config.d_mlp) for _ in range(config.n_layers))
        else:
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(width, config.n_heads, config.d_mlp, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True) for _ in range(config.n_layers))
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)       # torch's own are drawn from its global state

    def encode(self, bits: Int[Tensor, "example bit"], place: Int[Tensor, "example"] | int,
               ) -> Float[Tensor, "example pos d_model"]:
        """The state that holds ``bits`` at a place: code, clock and what marks the positions."""
        place = torch.as_tensor(place).expand(len(bits))
        signs = 2.0 * bits - 1
        code = (torch.einsum("eb,ebd->ed", signs, self.codes[place])[:, None]
                if self.config.arrangement == "vector" else signs[..., None] * self.codes[place])
        return code + self.clocks[place][:, None] + self.base[place]

    def run(self, bits: Int[Tensor, "example bit"], n_loops: int | None = None) -> Int[Tensor, "example bit"]:
        """The bits after the first ``n_loops`` operations."""
        for operation in self.operations[:n_loops]:
            bits = operation(bits)
        return bits

    def block(self, x: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example pos d_model"]:
        for layer in self.layers:
            x = layer(x)
        return x

    def readout(self, x: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example bit 2"]:
        """Logits of the bits that a state at the last place holds; the positions are the bits."""
        content = x - self.clocks[-1] - self.base[-1]
        codes = self.codes[-1]
        along = (content @ codes.T)[:, 0] if self.config.arrangement == "vector" else (content @ codes[0])
        logit = along / codes.square().sum(-1)
        return READOUT * torch.stack([-logit, logit], -1)

    def disturbed(self, x: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example pos d_model"]:
        """The state as it enters a loop: with ``clock_noise`` standard deviations of noise on its clock, the same for
        all positions. The noise is a fixed function of the state, so that a run can be repeated."""
        if not self.clock_noise:
            return x
        angle = 3 * x.mean(1, keepdim=True) @ self.noise_basis
        return x + self.clock_noise * 2 ** 0.5 * angle.sin()

    def forward(self, x: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example bit 2"]:
        for _ in self.operations:
            x = self.block(self.disturbed(x))
        return self.readout(x)


READOUT = 4.0
"""Logit of a bit whose code is read without an error: its probability is 1 / (1 + exp(−2 · READOUT))."""


@dataclass(frozen=True)
class TrainedCodec:
    """A codec and what is known about it."""

    module: Codec
    accuracy: float                     # share of bits right after the whole sequence, on inputs of another seed
    steps: int                          # training steps taken

    @property
    def truth(self) -> str:
        """The sequence of operations, a letter per loop."""
        return self.module.config.sequence

    def model(self) -> LoopedModel:
        """The codec as analyses take it; `inputs` are its inputs, `targets` its targets."""
        names = [f"layers.{layer}" for layer in range(self.module.config.n_layers)]
        return adopt(self.module, layers=names, n_loops=len(self.truth), readout=self.module.readout)

    def noisy(self, clock_noise: float) -> TrainedCodec:
        """A copy whose clock is disturbed before each loop, by ``clock_noise`` standard deviations of its numbers: a
        dial. ``accuracy`` is measured again."""
        module = copy.deepcopy(self.module)
        module.clock_noise = clock_noise
        return replace(self, module=module, accuracy=run_accuracy(module, module.config.seed + 2))

    def inputs(self, n: int, *, seed: int) -> Float[Tensor, "example pos d_model"]:
        """States that enter loop 0, of random bits."""
        return self.module.encode(self._bits(n, seed), 0)

    def targets(self, n: int, *, seed: int) -> Int[Tensor, "example bit"]:
        """What the codec answers to `inputs` of the same seed: the bits after all operations."""
        return self.module.run(self._bits(n, seed))

    def _bits(self, n: int, seed: int) -> Int[Tensor, "example bit"]:
        return _random_bits(n, self.module.config.bits, torch.Generator().manual_seed(seed))


def _random_bits(n: int, bits: int, generator: torch.Generator) -> Int[Tensor, "example bit"]:
    return torch.randint(0, 2, (n, bits), generator=generator)


CHECKED_EVERY = 250
"""Training steps between two looks at the accuracy."""

N_CHECKED = 512
"""Examples in such a look."""


def codec(sequence: str, *, operations: Mapping[str, Operation] = OPERATIONS, **settings: object) -> TrainedCodec:
    """Train a codec for a sequence of letters; ``settings`` are those of `CodecConfig`.

    Training stops as soon as the whole sequence runs at ``target`` on random bits of another seed. Raises
    `CodecFailed` if that is not reached in ``steps`` steps, ValueError for letters without an operation.
    """
    config = CodecConfig(sequence, **settings)  # type: ignore[arg-type]
    module = Codec(config, operations)
    generator = torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.AdamW(module.layers.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1.0, (step + 1) / 100, max(0.02, 2 * (1 - step / config.steps))))
    accuracy = 0.0
    for step in range(1, config.steps + 1):
        loss = _loss(module, _random_bits(config.batch_size, config.bits, generator), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % CHECKED_EVERY == 0 or step == config.steps:
            accuracy = run_accuracy(module, config.seed + 2)
            if accuracy >= config.target:
                return TrainedCodec(module.eval().requires_grad_(False), accuracy, step)
    raise CodecFailed(f"the codec {sequence} reached {accuracy:.3f} of its bits after {config.steps} steps, not "
                      f"{config.target}: give it more steps or layers, fewer bits, or another seed.")


@torch.no_grad()
def run_accuracy(module: Codec, seed: int) -> float:
    """The share of bits that are right after the whole sequence, on random ones."""
    bits = _random_bits(N_CHECKED, module.config.bits, torch.Generator().manual_seed(seed))
    return float((module(module.encode(bits, 0)).argmax(-1) == module.run(bits)).float().mean())


def _loss(module: Codec, bits: Int[Tensor, "example bit"], generator: torch.Generator) -> Float[Tensor, ""]:
    """Squared error of the block, each example at a loop of its own, in units of a code's mean square."""
    n_loops = len(module.operations)
    place = torch.randint(0, n_loops, (len(bits),), generator=generator)
    after = torch.stack([operation(bits) for operation in module.operations])[place, torch.arange(len(bits))]
    before = module.encode(bits, place)
    noise = torch.randn(before.shape, generator=generator)
    return F.mse_loss(module.block(before + module.config.noise * noise), module.encode(after, place + 1))
