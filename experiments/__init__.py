"""What measured the tables that the book shows from ``data/results``.

    python -m experiments                              list all tables
    python -m experiments digits_trades                measure what one of them lacks
    python -m experiments digits --seeds 0             every table whose name begins so, for one seed
    python -m experiments mnist --again                measure anew what is already there

A table ``data/results/SCALE_NAME.json`` is made by the function ``NAME`` in a file whose name begins with ``SCALE``.
The table says which, under ``made_by``, and the function's docstring says where the book shows it. The machinery is
:mod:`experiments.harness`. What a recipe trains is not here: ``robustood train`` and ``robustood evaluate`` make
those files.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported
