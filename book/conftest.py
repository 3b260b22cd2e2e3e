"""The notebooks' kernels inherit this process's environment: one thread each, as when they were executed."""

import os

from refresh import ONE_THREAD

os.environ.update(ONE_THREAD)
