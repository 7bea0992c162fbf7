"""Limits that every party of version 1 keeps to, so that what one window can cost is known beforehand."""

MAX_WINDOW_ROWS = 512
"""The most rows of one window: what one step, one frame and one block of logits must bear."""

MAX_ALIVE_SLOTS = 1024
"""The most slots that are not committed. A prompt chunk commits its own; speculation keeps some hundred in flight."""

MAX_COMMIT_SLOTS = MAX_ALIVE_SLOTS + MAX_WINDOW_ROWS
"""The most slots of one commit: all that can be alive with the window that brings it."""

MAX_DEAD_SLOTS = 4 * MAX_ALIVE_SLOTS
"""Dead slots above the root that a stage must remember, so that what builds on them is known to be dead, too."""

MAX_EARLY_WINDOWS = 16
"""Windows that came before one they build on. Within one line there are none; over several sockets there may be a few."""

MAX_ANSWER_SLOTS = 64
"""Slots of one answer: with log-probabilities of 20 alternatives it still fits a frame's header."""

MAX_LEASE_S = 120.0
"""The longest that a lease may go on without a sign of its owner."""

MAX_TOLD_SPANS = 1024
"""Spans of slots whose tokens one message tells to the tail: it fits a frame's header."""
