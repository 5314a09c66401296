"""Resident memory of this process, MiB."""

import resource
import sys
from pathlib import Path

import psutil


def resident_mib() -> float:
    """What is resident now."""
    return psutil.Process().memory_info().rss / 2**20


def peak_mib() -> float:
    """The most that was resident since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # Linux counts KiB, macOS bytes


def forget_peak() -> None:
    """Begin the peak that `peak_since_mib` reads anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_since_mib() -> float:
    """The most that was resident since `forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
