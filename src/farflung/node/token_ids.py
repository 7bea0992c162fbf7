"""Token ids as they come from outside: in one buffer, int32, little endian."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import ProtocolViolation
from farflung.protocol.events import Payload
from farflung.protocol.stage_state import ID_BYTES
from farflung.transport.link import Frame


def only_buffer(frame: Frame) -> memoryview:
    """Raises ProtocolViolation unless there is exactly one."""
    if len(frame.buffers) != 1:
        raise ProtocolViolation(f"a {type(frame.message).__name__} carries {len(frame.buffers)} buffers, expected one")
    return memoryview(frame.buffers[0])


def token_ids(buffer: Payload) -> NDArray[np.int32]:
    """int32 [n], over the same memory."""
    return np.frombuffer(buffer, dtype="<i4")


def check_vocabulary(buffer: Payload, vocab_size: int) -> None:
    """Raises ProtocolViolation for an id outside the vocabulary. A size that is no whole number of ids is told elsewhere."""
    if not buffer or len(buffer) % ID_BYTES:
        return
    ids = token_ids(buffer)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ProtocolViolation(f"token ids {low}..{high} are outside the vocabulary of {vocab_size}")
