"""Resident memory of this process, MiB."""

import resource
import sys

import psutil


def resident_mib() -> float:
    """What is resident now."""
    return psutil.Process().memory_info().rss / 2**20


def peak_mib() -> float:
    """The most that was resident since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # Linux counts KiB, macOS bytes
