"""A looped block whose programme is written into it, without training: planted answers for the stage test.

The state is [bits as ±1, clock as one of n]: the block reads its place from the clock, the bits from their signs,
applies that place's operation and writes the next clock. With ``turned`` every place has a rotation of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from hooks import adopt

BITS = 6
STRENGTH = 3.0


def shifted(z):
    return z.roll(1, 1) ^ (z & z.roll(2, 1))


def mirrored(z):
    return z.flip(1) ^ (z.roll(1, 1) & z.roll(3, 1))


def summed(z):
    return z.roll(2, 1) ^ z.roll(-1, 1)


def idle(z):
    return z


OPERATIONS = {"A": shifted, "B": summed, "C": mirrored, "I": idle}
"""A and C are alike up to a relabelling of their bits; B, a sum of two bits, is like neither."""


class Block(nn.Module):
    def __init__(self, sequence, clock):
        super().__init__()
        self.operations = [OPERATIONS[letter] for letter in sequence]
        self.clock = clock

    def forward(self, x):
        places = len(self.operations) + 1
        bits, place = (x[..., :BITS] > 0).long(), x[..., BITS:BITS + places].argmax(-1)
        flat = bits.flatten(0, 1)
        made = torch.stack([operation(flat) for operation in self.operations]).view(-1, *bits.shape)
        chosen = place.clamp_max(places - 2)
        bits = torch.gather(made, 0, chosen[None, ..., None].expand(1, *bits.shape))[0]
        return state(bits, (chosen + 1), places, self.clock)


def state(bits, place, places, clock):
    """[example, pos, bits + places]."""
    return torch.cat([2.0 * bits - 1, clock * nn.functional.one_hot(place, places).float()], -1)


class Planned(nn.Module):
    """``b`` is the shared block; it answers in logits [example, bit, 2]."""

    def __init__(self, sequence, clock=STRENGTH):
        super().__init__()
        self.sequence, self.b = sequence, Block(sequence, clock)

    def forward(self, x):
        for _ in self.sequence:
            x = self.b(x)
        return readout(x)


def readout(x):
    """Logits of the bits at the only position; the answers' positions are the bits."""
    return 2 * torch.stack([-x[:, 0, :BITS], x[:, 0, :BITS]], -1)


def planned(sequence, **options):
    return adopt(Planned(sequence, **options), layers=["b"], n_loops=len(sequence), readout=readout)


def examples(sequence, n=64, seed=0):
    """(inputs that enter loop 0, the bits after the whole sequence)."""
    bits = torch.randint(0, 2, (n, BITS), generator=torch.Generator().manual_seed(seed))
    inputs = state(bits[:, None], torch.zeros(n, 1, dtype=torch.long), len(sequence) + 1, STRENGTH)
    for letter in sequence:
        bits = OPERATIONS[letter](bits)
    return inputs, bits
