"""The experiments behind the tables in ``data/results`` that the book shows.

    python -m experiments                       list all tables
    python -m experiments digits_trades         measure the missing rows of one table
    python -m experiments digits --seeds 0      every table whose name starts with digits, seed 0 only
    python -m experiments mnist --again         measure again what is already there

``data/results/SCALE_NAME.json`` is made by the function ``NAME`` in a file whose name starts with ``SCALE``: the table
names both under ``made_by``, and the function's docstring says where the book shows it. The machinery is
:mod:`experiments.harness`. Runs of recipes are not made here, but by ``robustood train`` and ``robustood evaluate``.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported
