"""Claims: who works on what, among processes that share nothing but a folder.

A claim is an operating system's lock on a file (flock), so that it ends with the process that holds it, whatever ended
that. The lock files are empty and stay: one that was removed while others open it would let two processes in.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from configs.errors import UserError
from configs.whole_files import writing


@contextmanager
def claim(lock_file: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now has the claim; it is given back at the end. With `wait` it waits until it has it.

    Raises UserError on a file system without locks, and where the lock file cannot be created.
    """
    # Without locks filelock would leave a marker file instead, which a killed process cannot take away.
    lock = FileLock(lock_file, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        with writing(lock_file.parent):
            lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(
            f"{lock_file.parent} is on a file system without file locks ({error.strerror}), which processes need to "
            "share the work; name an output_dir on another one, or mount it with locks (Lustre: -o flock)"
        ) from error
    try:
        yield True
    finally:
        lock.release()


def is_claimed(lock_file: Path) -> bool:
    """Whether a live process has the claim. Changes nothing: the file is opened for reading only."""
    try:
        descriptor = os.open(lock_file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def alone(output_dir: str | Path) -> Iterator[None]:
    """Inside it, no other command of rlhf/pipeline.py or rlhf/rounds.py works on this folder: one would remove stages
    that the other is making. UserError where one is at work already."""
    if int(os.environ.get("RANK", "0")):  # of several processes the main one has the claim for all
        yield
        return
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; name a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with claim(folder / "rounds.lock") as mine:
        if not mine:
            raise UserError(
                f"output_dir: another command runs the stages of {folder}; wait for its end, or name another folder"
            )
        yield
