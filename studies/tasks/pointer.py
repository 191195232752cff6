"""Following pointers: f as shuffled key–value pairs, then chains x, f(x), f²(x), … to fill in.

Where the automaton is local, this task looks up by content: each hop needs the pair whose key
is the entity before. The pairs and each chain's start are given, the rest of the chains is free.
The permutation is a single cycle, so that a chain repeats nothing before it has seen every key.

    >>> print(Pointer(keys=4, hops=3).decode(Pointer(keys=4, hops=3).sample(1, seed=0).tokens[0]))
    c>d d>a a>b b>c | c d a b

With one chain an example teaches little; ``chains`` asks the same function from several starts at once. As many
chains as keys would give an answer away: each hop of them is then a permutation, of which the last cell follows from
the others without a look at the pairs. Each other chain excludes one entity, so that two of eight keys give away
little.

Small models stay at guessing for long, so that there is a curriculum (`Pointer.curriculum`): keys and hops grow, and
the rest of the sequence is blank. ``min_keys`` and ``min_hops`` below their maxima mix lengths: examples then use any
number of keys and hops in the range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task

FIRST_KEYS, FIRST_HOPS = 4, 1
"""Where the curriculum starts: what is learned from nothing."""
HELD = 0.2
"""Share of the curriculum before anything grows: looking up is found on the easiest examples or not at all."""
_NAMES = "abcdefghijklmnopqrstuvwxyz"
_MAX_KEYS = len(_NAMES)


@dataclass(frozen=True)
class Pointer(Task):
    """``hops`` applications of a cyclic permutation of up to ``keys`` entities out of ``entities``.

    Tokens: entities, a blank, the mask. Layout: key, value for each pair, then the chain. A quarter of all
    functions, chosen by a hash of the successor of every entity, is kept for testing.
    """

    name: ClassVar[str] = "pointer"
    region_name: ClassVar[str] = "hop"

    keys: int = 8                    # most pairs in an example, 2..26
    hops: int = 6                    # most hops in a chain
    entities: int = 0                # names to choose keys from; 0 means as many as keys
    chains: int = 1                  # chains in an example, from different starts
    min_keys: int = 0                # fewest pairs in an example; 0 means always ``keys``
    min_hops: int = 0                # fewest hops that are filled in; 0 means always ``hops``

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= self.n_entities <= _MAX_KEYS:
            raise ValueError(f"keys must be 2..entities and entities at most {_MAX_KEYS}, "
                             f"not {self.keys} and {self.n_entities}.")
        if self.hops < 1:
            raise ValueError(f"hops must be at least 1, not {self.hops}.")
        if self.min_keys and not 2 <= self.min_keys <= self.keys:
            raise ValueError(f"min_keys must be 0 or 2..{self.keys}, not {self.min_keys}.")
        if not 1 <= self.chains <= (self.min_keys or self.keys):
            raise ValueError(f"chains must be 1..{self.min_keys or self.keys}, the fewest keys that there are to "
                             f"start from, not {self.chains}.")
        if not 0 <= self.min_hops <= self.hops:
            raise ValueError(f"min_hops must be 0..{self.hops}, not {self.min_hops}.")

    @property
    def n_entities(self) -> int:
        return self.entities or self.keys

    @property
    def blank_id(self) -> int:
        return self.n_entities

    @property
    def vocab_size(self) -> int:
        return self.n_entities + 2

    @property
    def seq_len(self) -> int:
        return 2 * self.keys + self.chains * (self.hops + 1)

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        return self._sample(n, 2 * seed + (split == "test"), split, self.keys, self.hops)

    @property
    def has_curriculum(self) -> bool:
        return True

    def curriculum(self, n: int, seed: int, grown: float) -> Batch:
        """Training examples of at most so many keys and hops as grow evenly from `HELD` to 1, to the nearest whole
        number, from `FIRST_KEYS` (or the fewest there may be) and `FIRST_HOPS` to the task's."""
        if not 0 <= grown <= 1:
            raise ValueError(f"grown must be 0..1, not {grown}.")
        share = max(0.0, grown - HELD) / (1 - HELD)
        keys, hops = (min(first, last) + math.floor(max(0, last - first) * share + 0.5) for first, last in (
            (max(FIRST_KEYS, self.min_keys, self.chains), self.keys), (max(FIRST_HOPS, self.min_hops), self.hops)))
        return self._sample(n, 2 * seed, "train", keys, hops)

    def _sample(self, n: int, seed: int, split: str, keys: int, hops: int) -> Batch:
        """Examples of one split with at most ``keys`` and ``hops``, exactly so many where there is no minimum."""
        generator = torch.Generator().manual_seed(seed)
        kept = torch.empty(0, self.seq_len, dtype=torch.long)
        while len(kept) < n:
            draws = 4 * n + 8
            cycle = torch.rand(draws, self.n_entities, generator=generator).argsort(1)[:, :self.keys]
            n_keys = torch.randint(self.min_keys or keys, keys + 1, (draws,), generator=generator)
            n_hops = torch.randint(self.min_hops or hops, hops + 1, (draws,), generator=generator)
            order = torch.rand(draws, self.keys, generator=generator).argsort(1)
            starts = torch.zeros(draws, 1, dtype=torch.long)
            if self.chains > 1:   # the ring's first key, and others in random order
                rank = torch.rand(draws, self.keys, generator=generator)
                rank[:, 0] = -1
                rank = rank.masked_fill(torch.arange(self.keys) >= n_keys[:, None], 2)
                starts = rank.argsort(1)[:, :self.chains]
            chosen = self._is_test(cycle, n_keys) == (split == "test")
            kept = torch.cat([kept, self.layout(*(x[chosen] for x in (cycle, n_keys, n_hops, order, starts)))])
        tokens = kept[:n]
        free = (self.regions() > 0) & (tokens != self.blank_id)
        return Batch(tokens, free)

    def layout(self, cycle: Int[Tensor, "example key"], n_keys: Int[Tensor, "example"],
               n_hops: Int[Tensor, "example"], order: Int[Tensor, "example key"],
               starts: Int[Tensor, "example chain"]) -> Int[Tensor, "example pos"]:
        """Whole examples. The first ``n_keys`` of ``cycle`` follow one another in a ring; chains start at its places
        ``starts``. ``order`` shuffles the pairs' places."""
        slot = torch.arange(self.keys)
        inside = slot < n_keys[:, None]
        values = cycle.gather(1, (slot + 1) % n_keys[:, None])
        pairs = torch.stack([cycle, values], -1).masked_fill(~inside[..., None], self.blank_id)
        pairs = pairs.gather(1, order[..., None].expand(-1, -1, 2))
        hop = torch.arange(self.hops + 1)
        places = (starts[:, :, None] + hop).flatten(1) % n_keys[:, None]
        chains = cycle.gather(1, places).masked_fill(hop.repeat(self.chains) > n_hops[:, None], self.blank_id)
        return torch.cat([pairs.flatten(1), chains], 1)

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        blank = tokens == self.blank_id
        pairs = tokens[:, :2 * self.keys].unflatten(1, (self.keys, 2))
        chains = tokens[:, 2 * self.keys:].unflatten(1, (self.chains, -1))
        # The hop at which a pair is first used: where its key stands in a chain, before the last hop.
        match = (pairs[:, :, :1, None] == chains[:, None, :, :-1]) & (chains[:, None, :, 1:] != self.blank_id)
        places = match.any(2)                                                            # [example, pair, hop]
        used = torch.where(places.any(-1), places.int().argmax(-1) + 1, 0).masked_fill(blank[:, :2 * self.keys:2], -1)
        hop = torch.arange(self.hops + 1).repeat(self.chains).expand(len(tokens), -1)
        hop = hop.masked_fill(blank[:, 2 * self.keys:], -1)
        undefined = torch.full_like(tokens[:, :2 * self.keys], -1)
        return {
            "entity": Latent(tokens.masked_fill(blank, -1), self.n_entities, "the entity itself"),
            "hop": Latent(torch.cat([undefined, hop], 1), self.hops + 1, "hops from the start, on a chain"),
            "used_at": Latent(torch.cat([used.repeat_interleave(2, 1), torch.full_like(hop, -1)], 1), self.hops + 1,
                              "the first hop that uses the pair, 0 if none does"),
        }

    def regions(self) -> Int[Tensor, "pos"]:
        pairs = torch.zeros(2 * self.keys, dtype=torch.long)
        return torch.cat([pairs, torch.arange(self.hops + 1).repeat(self.chains)])

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        names = self.token_names()
        words = [names[token] for token in tokens.tolist()]
        pairs = [f"{words[2 * i]}>{words[2 * i + 1]}" for i in range(self.keys)]
        chains = [" ".join(words[i:i + self.hops + 1]) for i in range(2 * self.keys, self.seq_len, self.hops + 1)]
        return " | ".join([" ".join(pairs), *chains])

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        pairs, *chains = text.split("|")
        halves = [pair.split(">") for pair in pairs.split()]
        words = [word for half in halves for word in half] + [word for chain in chains for word in chain.split()]
        names = self.token_names()
        if len(halves) != self.keys or any(len(half) != 2 for half in halves) or len(chains) != self.chains \
                or any(len(chain.split()) != self.hops + 1 for chain in chains) or set(words) - set(names):
            raise ValueError(f"expected {self.keys} pairs like 'a>b' and {self.chains} times '|' and {self.hops + 1} "
                             f"entities, all out of {names}.")
        return torch.tensor([names.index(word) for word in words])

    def token_names(self) -> list[str]:
        return [*_NAMES[:self.n_entities], "_", "■"]

    def position_names(self) -> list[str]:
        pairs = [f"pair {i + 1}, {what}" for i in range(self.keys) for what in ("key", "value")]
        chain = ["start", *(f"hop {hop}" for hop in range(1, self.hops + 1))]
        if self.chains == 1:
            return [*pairs, *chain]
        return [*pairs, *(f"chain {i + 1}, {what}" for i in range(self.chains) for what in chain)]

    def model_defaults(self) -> dict[str, Any]:
        return {"d_model": 64, "n_heads": 4, "d_mlp": 256, "n_head_layers": 1, "n_loop_layers": 2,
                "n_tail_layers": 1, "max_loops": 8, "position": "rotary", "rotary_base": 100.0, "qk_norm": True}

    def _is_test(self, cycle: Int[Tensor, "example key"], n_keys: Int[Tensor, "example"]) -> Bool[Tensor, "example"]:
        """Hashes the function (not the start of the chain nor the order of pairs)."""
        slot = torch.arange(self.keys)
        values = cycle.gather(1, (slot + 1) % n_keys[:, None])
        term = ((cycle + 1) * 40503 + (values + 1) * 1_000_003) % (2 ** 31 - 1)
        term = (term * term % (2 ** 31 - 1)).masked_fill(slot >= n_keys[:, None], 0)
        return (term.sum(1) * 2654435761 % 2 ** 32 >> 16) % 4 == 0
