"""What this machine trains fast with: bfloat16 instructions and a compiler, each asked for in one place.

A recipe multiplies matrices in bfloat16 and compiles its blocks where the machine can, and says in a sentence what it
goes without. What the user asks for by name is taken as it is.

    fast = fastest("cpu")
    fast.precision, fast.compile, fast.notes       # "fp32", True, ("This CPU has no bfloat16 instructions …",)
    fastest("cpu", precision="bf16").precision     # "bf16": slow where there are no instructions, and the notes say so
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names under which `torch.cpu.get_capabilities` tells of bfloat16 products: two of x86, one of ARM."""


@dataclass(frozen=True)
class FastSettings:
    """How to train on one machine."""

    precision: Precision
    compile: bool
    notes: tuple[str, ...]   # sentences on what the machine lacks, if it matters here


def fastest(device: str, *, precision: Precision | None = None, compile: bool | None = None) -> FastSettings:
    """bfloat16 and compiled blocks where ``device`` ("cpu", "cuda:1") has what they need; what is given is kept."""
    notes, fast = [], has_bf16(device)
    if not fast:
        lacks = f"This {'CPU' if device == 'cpu' else 'device'} has no bfloat16 instructions"
        if precision is None:
            notes.append(f"{lacks}: matrix products are in float32 (--precision bf16 asks for bfloat16 all the same).")
        elif precision == "bf16":
            notes.append(f"{lacks}: --precision fp32 is likely to be faster.")
    missing = missing_for_compile(device)
    if missing is not None and compile is None:
        notes.append(f"{missing[0].upper()}{missing[1:]}: blocks are not compiled, and training is slower.")
    return FastSettings(precision or ("bf16" if fast else "fp32"), missing is None if compile is None else compile,
                  tuple(notes))


def has_bf16(device: str) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices by instructions of its own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(bool(known.get(name)) for name in BF16_INSTRUCTIONS)


def missing_for_compile(device: str) -> str | None:
    """What torch.compile lacks for ``device``, in words; None if nothing. On a CPU it compiles C++ against Python's
    headers."""
    if torch.device(device).type != "cpu":
        return None
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler} on the PATH"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's C headers are not installed ({header}; python3-dev on Debian)"
    return None
