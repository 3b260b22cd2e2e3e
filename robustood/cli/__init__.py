"""The command line: train and evaluate recipes, attack detectors, judge images, and fetch, check and pack images.

How a command ends is its exit code:

====  =================================================================================================
0     done
2     an error, which one line explains
3     the time given by ``--minutes`` ran out, or ``slice`` has recipes left; the same command resumes
4     ``attack`` is done, but its checks found errors, so that its numbers cannot be trusted
130   interrupted
====  =================================================================================================
"""

from __future__ import annotations

from robustood.cli._main import main, parser
from robustood.cli._shell import FAILED, FLAWED, INTERRUPTED, UNFINISHED

__all__ = ["FAILED", "FLAWED", "INTERRUPTED", "UNFINISHED", "main", "parser"]
