"""The command line."""

from convwave.cli.main import main

__all__ = ["main"]
