"""The floating-point arithmetic in which a notebook or a test runs.

Processors of different manufacturers and generations add numbers in different orders, which after a few hundred
training steps changes printed digits. Everything that can be fixed is fixed here. The remaining variation is measured
by ``spread.py``, and the notebook tests allow for it (``notebook_numbers.py``). ``ROBUSTOOD_ISA`` chooses:

``avx2``    the default: vectors of 256 bits, and the code path of Intel's library that works on all processors
``oldest``  the basic instructions that every x86-64 processor has
``native``  nothing fixed: what a reader's own process would do
"""

from __future__ import annotations

import os
import platform

THREADS = {
    "OMP_NUM_THREADS": "1",  # two threads would sum in another order, and waste time on busy machines
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
PINNED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",  # the only path of MKL that does not depend on the manufacturer
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
    """The environment variables that fix an arithmetic; set them before NumPy or torch is imported.

    Args:
        isa: a key of ``PINNED``; default: the environment variable ``ROBUSTOOD_ISA``, else "avx2". On processors
            other than x86-64 only the number of threads is fixed.

    Raises:
        ValueError: for an unknown arithmetic.
    """
    isa = isa or os.environ.get("ROBUSTOOD_ISA") or "avx2"
    if isa not in PINNED:
        raise ValueError(f"ROBUSTOOD_ISA must be one of {', '.join(PINNED)}, got {isa!r}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    return THREADS | (PINNED[isa] if x86 else {})
