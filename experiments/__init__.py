"""The experiments behind the tables in ``data/results`` that the book shows.

    python -m experiments                       list all tables
    python -m experiments digits_trades         measure the missing rows of one table
    python -m experiments digits --seeds 0      all tables whose names start with "digits", seed 0 only
    python -m experiments mnist --again         measure existing rows again

``data/results/SCALE_NAME.json`` is made by the function ``NAME`` in a file whose name starts with ``SCALE``: the table
names both under ``made_by``, and the docstring of the function says where the book shows it. The common code is in
:mod:`experiments.harness`. Recipes are not run here, but by ``robustood train`` and ``robustood evaluate``.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported
