"""The notebooks' kernels inherit this process's environment: one thread each, and AVX2, as when they were executed."""

import os

from refresh import KERNEL_ENV

os.environ.update(KERNEL_ENV)
