"""The command line: train and evaluate recipes, attack and judge detectors, and fetch, check and pack images."""

from __future__ import annotations

from robustood.cli._main import main, parser
from robustood.cli._shell import FAILED, FLAWED, INTERRUPTED, UNFINISHED

__all__ = ["FAILED", "FLAWED", "INTERRUPTED", "UNFINISHED", "main", "parser"]
