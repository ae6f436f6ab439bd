"""Teach a deployed segmentation model a new class without the old data, and prove it forgot nothing."""

__version__ = "0.1.0"
