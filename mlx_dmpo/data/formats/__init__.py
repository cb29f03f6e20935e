"""Data files of every format that docs/data.md shows, as examples: one module for each family of formats."""

from .dataset import DataFile, load, load_examples

__all__ = ["DataFile", "load", "load_examples"]
