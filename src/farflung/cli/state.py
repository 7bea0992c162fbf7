"""A node's key between runs: which one, where, and only in one process at a time.

Two processes under one key would pass for one node. So each key has a lock file beside it, held as long as the node runs: in
the user's own folder a second node takes the next free key, in a folder that was named it is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from farflung.core.errors import IdentityError, UsageError
from farflung.identity.keys import Identity

MOST_NODES = 256
"""Nodes of one user on one machine."""


@contextmanager
def claimed_identity(folder: Path | None, *, ephemeral: bool) -> Iterator[Identity]:
    """An identity that no other process uses while the block runs.

    Args:
        folder: where keys are kept; None: the user's own folder.
        ephemeral: a new key that is not kept.

    Raises UsageError (``folder`` is in use by another node), IdentityError.
    """
    if ephemeral:
        yield Identity.generate()
        return
    place = folder or platformdirs.user_data_path("farflung", appauthor=False) / "nodes"
    for number in range(1, 2 if folder else MOST_NODES + 1):
        name = "node" if folder else f"node-{number}"
        with _locked(place / f"{name}.lock") as got_it:
            if got_it:
                yield Identity.load_or_create(place / f"{name}.key")
                return
    raise UsageError(f"another node is running with the key in {place}", hint="give each node a --state folder of its own")


@contextmanager
def driver_identity(path: Path | None) -> Iterator[Identity]:
    """A driver's key: that in ``path``, made there if there is none, or a new one that is not kept.

    Raises UsageError (another process uses it now: nodes would take the two for one), IdentityError.
    """
    if path is None:
        yield Identity.generate()
        return
    with _locked(path.with_name(f"{path.name}.lock")) as got_it:
        if not got_it:
            raise UsageError(f"another process runs with the key in {path}", hint="give each an --identity of its own")
        yield Identity.load_or_create(path)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process could take the lock; held until the block ends, or the process does."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise IdentityError(
            f"{path} cannot be written: {error.strerror}", hint="name a folder of your own with --state, or use --ephemeral"
        ) from error
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
