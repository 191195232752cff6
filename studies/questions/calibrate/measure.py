"""What the calibration of the stage test runs: every control, seed, number of examples and setting of a dial.

    todo = cases()                                            # what is asked, in the order in which it runs
    row = run_case(todo[0])                                   # one call of the stage test: row["regime"] …

**What was looked at while the rule was made, and what was kept.** The thresholds (`probes.thresholds`) were set with
programmes of the operations A to D and of S, T and P in view, turned or not, and with models trained on automaton and
sudoku. Kept for the final table, with no part in the rule: odd seeds (of examples, weights and training), programmes
of the operations E to H, and of P to R (but for SP), and all surgery on the task arithmetic. (τ of the plain arithmetic
models themselves had been seen.) What was changed after a look at results is listed in `CHANGED`, and is on the page.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooks import HookedLoopMDM, LoopedModel
from hooks.contract import Inputs
from hooks.model.diffusion import corrupt
from probes.cycles import own_loops, pseudo_loops
from probes.exchange import exchange, tau
from probes.stage_test import stage_test
from studies.questions.controls import (
    OPERATIONS,
    SHAPES,
    CodecFailed,
    Operation,
    codec,
    counter,
    far_loops,
    gated_copy,
    load_codec,
    mixture,
    per_loop_attention,
    per_loop_mlp,
    task_batches,
    unrolled_copy,
    untrained,
)
from studies.questions.controls.codec_files import CODECS, bundled_codecs
from studies.tasks import Automaton, Task
from studies.zoo import ZOO, load

KEPT_OPERATIONS = frozenset("EFGH")
KEPT_TASK = "arithmetic"
TASKS = ("automaton", "sudoku", KEPT_TASK)
VARIANT = {"sudoku": "-6x6"}
"""Tasks whose zoo models are operated on, and which variant of them."""

FRESH = ("EEEE", "EFGH", "EFEF", "EEFF", "FEEE", "GFHF", "HGEG", "ST", "SP", "RQ", "PRQ", "PPP-turned")
"""Programmes that are trained here, of operations that the rule had not seen, on 9 bits. (On a ring of 8, four times E
gives zeros whatever the bits are, and F before three times E changes nothing: a first run had these truths wrong, and
the test was right to call them nothing, and loop 0 idle.)"""
EXAMPLES = 32
"""Examples of a call on models of tasks, each with many positions."""
PROGRAMME_EXAMPLES = 128
"""Examples of a call on a codec, each a single position, unless their number is what is varied."""
DIAL_EXAMPLES = 64
"""Examples of a call on a codec between two truths, or with noise."""
SIZES = (16, 32, 64, 128)
SWEPT = ("AAAA", "ABAB", "ABCD")
"""Numbers of examples, and the codecs of which they, and the noise on the clock, are varied."""
TURNED_SUFFIX = "-turned"
TURNED = ("AAAA-turned", "ABCD-turned")
"""Codecs of which numbers of examples are varied too: a basis has to be fitted."""
IDLE_TASKS = ("text",)
"""Tasks on which the zoo's models were found to gain hardly anything by their loops."""
CUT = (("automaton", 0), (KEPT_TASK, 1))
"""Task and seed of what is operated on."""
NOISE = (0.4, 0.8, 1.6)
MIXED = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAKS = (0.0, 0.3, 1.0)
SHARES = (0.0, 0.5, 1.0)
"""Settings of the dials."""
T = 0.9
"""Noise level at which models of tasks are tested."""
LOOPS = 4
"""Loops of models of tasks."""

CHANGED = (
    "The rule: an untrained model, whose first loop did harm that a later one undid, was called settled; now that is "
    "said only where some loop improved the answer. The untrained models here have seeds that were not seen then.",
    "The rule: AAAA with 16 examples of seed 1 was printed as ABBB although nothing was decided about loop 0, whose "
    "letter is now left open. That call counts as looked at.",
    "The codecs: they were trained with noise of 0.1 and are now with 0.8. With 0.1, AAAA in a turned basis and ABCABC "
    "were called unrolled: the blocks did not run their operation on contents that stood a little beside the codes.",
    "The fresh codecs: on rings of 8 bits EEEE was called nothing and loop 0 of FEEE idle, which is true there; they "
    "have 9 bits now. EFGH and GFHF were undecided before and after.",
    "Weights per loop were to count as changing, and their MLPs on automaton came out as iterating. Nothing forces "
    "them to change; they are listed and not counted.",
    "The number of examples: 32 in a first run, in which 14 of 57 kept calls were undecided, most of them on codecs of "
    "which an example has a single position. It is 64 now, and calls with 16 and 32 show what fewer give.",
    "The rule: GFHF was undecided although τ as it stands had decided every pair, because a fitted basis decided "
    "nothing. A programme that τ shows now stands in that case. GFHF counts as looked at, and HGEG was added.",
    "The gated copy: scales of norms were folded into weights, whose rounding moved τ of the sudoku twin by 5e-4.",
    "The number of examples again: with 64, 8 of 48 kept calls were undecided (none wrong). It is 128 now on codecs; "
    "64 is in the table by examples.",
    "The rule: where no pair of loops exchanges both ways and the mean says that they do, nothing is decided. No call "
    "had shown that; it is for a case made up of numbers alone.",
    "The rule: TSRT with 32 examples was called unrolled while nothing was decided about loop 0, which does what loop "
    "3 does. That is undecided now.",
    "The rule: ST was called iterating in a drifting basis. In the basis that suits it best, an operation that is "
    "merely alike does .5 to .8 of another's work, and the same operation .92 to 1.00. In a fitted basis, same is now "
    "above .8 and different below .5. ST and SP count as looked at; RQ, PRQ and turned PPP were added.",
)
"""What was changed after results of this study had been seen, in the order in which it was."""
SEEN = ("AAAA", 1, 16)
"""Codec, seed and examples of a kept call that was seen, and had a part in the rule."""
SEEN_PROGRAMMES = ("GFHF", "ST", "SP")
"""Fresh programmes that were seen, and had a part in the rule."""

Truth = Literal["programme", "own weights", "never the same", "settled", "nothing", "idle", "dial", "identity",
                "shuffled"]


SURGERY: tuple[tuple[str, str, Truth], ...] = (
    ("MLPs", "weights of its own", "own weights"), ("attention", "weights of its own", "own weights"),
    ("counter", "counter", "never the same"))
"""What is cut into the loop of a trained model, which kind of control that is, and its truth."""


@dataclass(frozen=True)
class Prepared:
    """A model with examples for it."""

    model: LoopedModel
    examples: Callable[[int, int], tuple[Inputs, Int[Tensor, "example answer"], Bool[Tensor, "example answer"]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float | None = None


@dataclass(frozen=True)
class Case:
    """One question to the stage test. ``subject`` makes the model; it is called when the case runs."""

    control: str                       # what people call it
    family: str                        # what kind of control it is
    truth: Truth
    sequence: str                      # of a programme
    seed: int
    n: int                             # examples
    kept: bool                         # had no part in making the rule
    subject: Callable[[], Any] = field(compare=False, repr=False)
    dial: float | None = None

    @property
    def key(self) -> str:
        """Tells the case from all others, in every run."""
        dial = "" if self.dial is None else f" at {self.dial:g}"
        return f"{self.family}: {self.control}{dial}, seed {self.seed}, {self.n} examples"


# ---------------------------------------------------------------------------- the cases

def cases(zoo: Path = ZOO, codecs: Path = CODECS) -> list[Case]:
    """Everything that is measured. Keys are unique; cases of one subject follow one another."""
    return [*_on_untrained(), *_on_codecs(codecs), *_on_fresh(), *_on_tasks(zoo), *_on_dials(zoo, codecs)]


def _on_untrained() -> list[Case]:
    task = Automaton(rule=30, width=8, rows=4)
    return [Case(shape, "untrained", "nothing", "", seed, EXAMPLES, _odd(seed),
                 functools.partial(_untrained, shape, seed, task))
            for seed in range(6, 12) for shape in SHAPES]


def _on_codecs(codecs: Path) -> list[Case]:
    made = []
    for name in bundled_codecs(codecs):
        subject = functools.partial(_bundled, str(codecs / name))
        sequence = subject().sequence
        slow = "positions" in name
        sizes = [(seed, PROGRAMME_EXAMPLES) for seed in ((1,) if slow else (0, 1))]
        sizes += [(seed, n) for seed in (0, 1) for n in SIZES if n != PROGRAMME_EXAMPLES and name in (*SWEPT, *TURNED)]
        made += [Case(name, "codec", "programme", sequence, seed, n, _odd(seed) and (name, seed, n) != SEEN, subject)
                 for seed, n in sizes]
        made += [Case(name, "shuffled content", "shuffled", sequence, seed, 64, _odd(seed), subject)
                 for seed in (0, 1)]
    return made


def _on_fresh() -> list[Case]:
    return [Case(name, "fresh codec", "programme", name.removesuffix(TURNED_SUFFIX), seed, PROGRAMME_EXAMPLES,
                 name not in SEEN_PROGRAMMES, functools.partial(_fresh, name, seed))
            for seed in (1, 3) for name in FRESH]


def _on_tasks(zoo: Path) -> list[Case]:
    made = []
    for name in TASKS:
        kept, there = name == KEPT_TASK, functools.partial(_entry, str(zoo), name)
        made += [Case(name, "gated copy and deep twin", "identity", "", 0, EXAMPLES, kept,
                      functools.partial(_gated, there)),
                 Case(name, "loop and unrolled copy", "identity", "", 0, EXAMPLES, kept,
                      functools.partial(_disguised, there)),
                 Case(name, "far loops", "settled", "", 0, EXAMPLES, kept, functools.partial(_far, there))]
    for name in IDLE_TASKS:
        made.append(Case(name, "idle loops", "idle", "", 0, EXAMPLES, False,
                         functools.partial(_idle, functools.partial(_entry, str(zoo), name))))
    for name, seed in CUT:
        there = functools.partial(_entry, str(zoo), name)
        made += [Case(f"{name}, {what}", family, truth, "", seed, EXAMPLES, name == KEPT_TASK or _odd(seed),
                      functools.partial(_cut, there, what, seed))
                 for what, family, truth in SURGERY]
    return made


def _on_dials(zoo: Path, codecs: Path) -> list[Case]:
    made = [Case("A, B mixed into A, A", "mixture of two operations", "dial", "AMA", seed, DIAL_EXAMPLES, _odd(seed),
                 functools.partial(_mixed, share, seed), share)
            for seed in (0, 1) for share in MIXED]
    made += [Case(name, "noise on the clock", "dial", name, seed, DIAL_EXAMPLES, _odd(seed),
                  functools.partial(_bundled, str(codecs / name), noise), noise)
             for name in SWEPT for seed in (1,) for noise in NOISE if (codecs / name).is_dir()]
    there = functools.partial(_entry, str(zoo), "automaton")
    made += [Case("automaton", "leak of the gate", "dial", "", 0, EXAMPLES, False,
                  functools.partial(_leaking, there, leak), leak) for leak in LEAKS]
    return made + [Case("automaton", "share of own weights", "dial", "", 1, EXAMPLES, True,
                        functools.partial(_cut, there, "MLPs", 1, share), share) for share in SHARES]


def _odd(seed: int) -> bool:
    """Odd seeds are kept."""
    return seed % 2 == 1


def run_case(case: Case) -> dict[str, Any]:
    """What came out of one case, for JSON."""
    began = time.monotonic()
    row = {"key": case.key, "control": case.control, "family": case.family, "truth": case.truth,
           "sequence": case.sequence, "seed": case.seed, "n": case.n, "dial": case.dial, "kept": case.kept}
    found = case.subject()
    if case.truth == "identity":
        row |= _apart(*found, n=case.n, seed=case.seed)
    elif case.truth == "shuffled":
        row |= _shuffled(found, case)
    else:
        row |= _tested(found, case)
    return row | {"seconds": round(time.monotonic() - began, 1)}


def _tested(subject: Prepared, case: Case) -> dict[str, Any]:
    inputs, targets, scored = subject.examples(case.n, 100 + case.seed)
    verdict = stage_test(subject.model, inputs, targets=targets, scored=scored, **subject.options)
    row = verdict.rows()[0]
    return {"regime": verdict.regime, "letters": verdict.letters, "basis": verdict.basis, "reason": row["reason"],
            "accuracy": subject.accuracy, **{name: _number(row.get(name)) for name in (
                "tau", "tau_low", "tau_high", "aligned_tau", "work", "gain")},
            "least_equal": _extreme(case, verdict.tau.values, True),
            "largest_different": _extreme(case, verdict.tau.values, False),
            "least_equal_aligned": _extreme(case, _values(verdict.aligned), True),
            "largest_different_aligned": _extreme(case, _values(verdict.aligned), False)}


def _values(matrix: Any) -> np.ndarray | None:
    return None if matrix is None else np.asarray(matrix.values)


def _extreme(case: Case, matrix: np.ndarray | None, equal: bool) -> float | None:
    """Of a programme's matrix: the least τ of two loops that run the same operation, or the largest of two that do not,
    each pair by the lesser of its directions."""
    letters = np.array(list(case.sequence))
    if case.truth != "programme" or matrix is None or matrix.shape != (len(letters), len(letters)):
        return None
    pairs = np.minimum(matrix, matrix.T)[np.triu_indices(len(letters), 1)]
    same = (letters[:, None] == letters[None])[np.triu_indices(len(letters), 1)]
    chosen = pairs[same == equal]
    return None if not len(chosen) else _number(chosen.min() if equal else chosen.max())


def _apart(one: Prepared, other: Prepared, *, n: int, seed: int) -> dict[str, Any]:
    """The largest differences between two models that compute the same: of logits, and of τ of loops and of layers."""
    inputs, _, scored = one.examples(n, 100 + seed)
    with torch.no_grad():
        logits = (one.model(inputs, one.options.get("n_loops")) - other.model(inputs, other.options.get("n_loops")))
    found: dict[str, Any] = {"logits": _number(logits.abs().max())}
    for maps in ("loop", "layer"):
        pairs = None
        matrices = []
        for subject in (one, other):
            period = subject.options.get("layers_per_loop")
            model = subject.model
            cycle = own_loops(model.topology(LOOPS)) if period is None else pseudo_loops(model.topology(1), period)
            matrices.append(tau(exchange(model, inputs, cycle, maps=maps, scored=scored, pairs=pairs)).values)
        found[f"tau_{maps}"] = _number(np.abs(matrices[0] - matrices[1]).max())
        found[f"tau_{maps}_relative"] = _number((np.abs(matrices[0] - matrices[1])
                                                 / np.maximum(1, np.abs(matrices[0]))).max())
    return found


def _shuffled(subject: Prepared, case: Case) -> dict[str, Any]:
    """τ where each exchange works on the content of another example: the mean and the largest over pairs."""
    inputs, _, scored = subject.examples(case.n, 100 + case.seed)
    cycle = own_loops(subject.model.topology())
    clean = exchange(subject.model, inputs, cycle, scored=scored)
    moved = exchange(subject.model, inputs, cycle, scored=scored, shuffle=case.seed)
    value = (1 - moved.kl.mean("example") / clean.work.mean("example")).values
    return {"tau": _number(value.mean()), "tau_high": _number(value.max())}


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(float(value)) else round(float(value), 6)


# ------------------------------------------------------------------------- the subjects

@functools.lru_cache(maxsize=2)
def _bundled(path: str, noise: float = 0.0) -> _Programme:
    made = load_codec(path)
    return _Programme.of(made.noisy(noise) if noise else made)


@functools.lru_cache(maxsize=1)
def _fresh(name: str, seed: int) -> _Programme:
    sequence = name.removesuffix(TURNED_SUFFIX)
    return _trained(sequence, 10 + seed, bits=9, turned=sequence != name)


@functools.lru_cache(maxsize=1)
def _mixed(share: float, seed: int) -> _Programme:
    operations = {**OPERATIONS, "M": mixture(OPERATIONS["A"], OPERATIONS["B"], share)}
    return _trained("AMA", 20 + seed, bits=8, operations=operations)


def _trained(sequence: str, seed: int, *, bits: int, turned: bool = False,
             operations: Mapping[str, Operation] = OPERATIONS) -> _Programme:
    """A codec of this seed, or of the next one (100 on) that learns its sequence."""
    def made(attempt: int) -> _Programme:
        return _Programme.of(codec(sequence, operations=operations, bits=bits, turned=turned,
                                   seed=seed + 100 * attempt))

    for attempt in range(TRIES - 1):
        with contextlib.suppress(CodecFailed):
            return made(attempt)
    return made(TRIES - 1)


TRIES = 3
"""Seeds that are tried until a codec learns its sequence."""


@dataclass(frozen=True)
class _Programme(Prepared):
    sequence: str = ""

    @classmethod
    def of(cls, made: Any) -> _Programme:
        def examples(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
            targets = made.targets(n, seed=seed)
            return made.inputs(n, seed=seed), targets, torch.ones_like(targets, dtype=torch.bool)

        return cls(made.model(), examples, {}, made.accuracy, made.truth)


def _of_task(model: LoopedModel, task: Task, **options: Any) -> Prepared:
    def examples(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = task.sample(n, seed=seed, split="test")
        noised = corrupt(batch.tokens, T, task.mask_token_id, free=batch.free,
                         generator=torch.Generator().manual_seed(seed))
        return noised, batch.tokens, noised == task.mask_token_id

    return Prepared(model, examples, options)


def _untrained(shape: str, seed: int, task: Task) -> Prepared:
    return _of_task(untrained(shape, seed, task=task), task)


@functools.lru_cache(maxsize=4)
def _entry(zoo: str, task: str, kind: str = "loop") -> tuple[HookedLoopMDM, Task]:
    entry = load(Path(zoo) / f"{task}-{kind}{VARIANT.get(task, '')}")
    return entry.model, entry.task


def _gated(there: Callable[..., tuple[HookedLoopMDM, Task]]) -> tuple[Prepared, Prepared]:
    (loop, task), (deep, _) = there(), there("deep")
    period = loop.config.n_loop_layers
    return (_of_task(gated_copy(deep, period), task), _of_task(deep, task, layers_per_loop=period))


def _disguised(there: Callable[..., tuple[HookedLoopMDM, Task]]) -> tuple[Prepared, Prepared]:
    loop, task = there()
    return (_of_task(loop, task, n_loops=LOOPS),
            _of_task(unrolled_copy(loop, LOOPS), task, layers_per_loop=loop.config.n_loop_layers))


def _far(there: Callable[..., tuple[HookedLoopMDM, Task]]) -> Prepared:
    loop, task = there()
    late = far_loops(loop)
    return _of_task(loop, task, n_loops=late[1], loop_ranges=(late,))


def _idle(there: Callable[..., tuple[HookedLoopMDM, Task]]) -> Prepared:
    loop, task = there()
    return _of_task(loop, task, n_loops=LOOPS)


def _leaking(there: Callable[..., tuple[HookedLoopMDM, Task]], leak: float) -> Prepared:
    (loop, task), (deep, _) = there(), there("deep")
    return _of_task(gated_copy(deep, loop.config.n_loop_layers, leak=leak), task)


@functools.lru_cache(maxsize=1)
def _cut(there: Callable[..., tuple[HookedLoopMDM, Task]], what: str, seed: int, share: float = 1.0) -> Prepared:
    loop, task = there()
    batches = task_batches(task, batch_size=16, seed=seed)
    if what == "counter":
        made = counter(loop, LOOPS, seed=seed, batches=batches, steps=STEPS)
    else:
        surgery = per_loop_mlp if what == "MLPs" else per_loop_attention
        made = surgery(loop, LOOPS, share=share, seed=seed, batches=batches, steps=STEPS)
    return _of_task(made, task, n_loops=LOOPS)


STEPS = 150
"""Training steps after surgery."""

CONTROLS: Mapping[Truth, str] = MappingProxyType({
    "programme": "the sequence of operations that was trained into it",
    "own weights": "each loop has weights of its own",
    "never the same": "each loop is told which it is, loudly", "settled": "twice S_max and later",
    "nothing": "nothing was learned", "idle": "loops that gain hardly anything, as their training showed",
    "dial": "between two truths", "identity": "two models compute the same", "shuffled": "content of another example"})
"""What each kind of truth rests on."""
