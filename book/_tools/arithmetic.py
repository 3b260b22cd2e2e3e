"""Which arithmetic a notebook or a test computes in.

Processors of other makers and generations add the same numbers in other orders, and a network trained for some
hundred steps shows it in a printed digit. All that can be pinned is pinned here; what is left, notebooks measure
(``spread.py``) and their tests allow for (``notebook_numbers.py``). ``ROBUSTOOD_ISA`` chooses:

``avx2``    the default: vectors of 256 bits everywhere, Intel's library on the path that it shares with other makers
``oldest``  the least that x86-64 has
``native``  nothing pinned: what a reader's own process would do
"""

from __future__ import annotations

import os
import platform

THREADS = {
    "OMP_NUM_THREADS": "1",  # on busy machines two threads spin, and each sums in its own order
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
PINNED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",  # the one path of MKL that does not ask who made the processor
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    },
    "oldest": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    },
    "native": {},
}


def environment(isa: str | None = None) -> dict[str, str]:
    """The environment variables of an arithmetic, for before NumPy or torch are imported.

    Args:
        isa: a key of ``PINNED``; default: the environment's ``ROBUSTOOD_ISA``, else "avx2". Other
            processors than x86-64 have nothing to pin but the threads.

    Raises:
        ValueError: for an arithmetic that does not exist.
    """
    isa = isa or os.environ.get("ROBUSTOOD_ISA") or "avx2"
    if isa not in PINNED:
        raise ValueError(f"ROBUSTOOD_ISA must be one of {', '.join(PINNED)}, got {isa!r}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    return THREADS | (PINNED[isa] if x86 else {})
