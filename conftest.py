"""What every test and every notebook starts from, also where one notebook alone is tested."""

import os

from arithmetic import environment

os.environ.update(environment())  # before NumPy or torch is imported; kernels inherit it

pytest_plugins = ["notebook_numbers"]  # compares what notebooks print by its meaning
