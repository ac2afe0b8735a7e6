"""Exclusive file lock: one writer per file."""

import fcntl

from ..errors import ConfigError, Problem


def acquire_exclusive_lock(descriptor: int, field: str, value: str | None, held_hint: str) -> None:
    """Lock an open file for this process until it is closed.

    Raises `ConfigError` about `field` and `value`: with `held_hint` if another process has the lock, or if the file
    system has no locks.
    """
    # The kernel releases a flock when its holder ends, however it ends; a lock file would stay after a kill.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError([Problem(field, value, held_hint)]) from error
    except OSError as error:
        hint = (
            f"cannot be locked ({error.strerror}), so two runs could write into it; use a file system with "
            "flock (Lustre: mount it with -o flock), or name another training.run_dir"
        )
        raise ConfigError([Problem(field, value, hint)]) from error
