"""Files written whole: a reader, or a run killed at any moment, sees the old file or the new one, never a part."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError

# What a user can repair: disk or quota full, file too large for the limits, no right to write, a read-only disk.
REPAIRABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside it, a full disk or missing rights are a UserError that names the folder; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in REPAIRABLE:
            raise
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. What is written already is kept: make room there, or get "
            "the right to write, and start the same command again"
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file in the same folder, force it to the disk, then give it the name `path`.

    Any number of processes may write the same path: each has its own temporary file, and the last one stands. Raises
    UserError where the disk is full or not writable; the old file then stays, and the temporary one is gone.
    """
    # Processes of several machines may share the folder and a process id, so the name holds a random part too.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with writing(path.parent):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
