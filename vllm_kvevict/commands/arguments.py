"""Types of command-line arguments that several commands take; they raise ``argparse.ArgumentTypeError``."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def file_to_write(text: str) -> Path:
    """Return a file in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # found out before the engine starts
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path
