"""Limits that every party of version 1 keeps to, so that what one window can cost is known beforehand."""

MAX_WINDOW_ROWS = 512
"""The most rows of one window: what one step, one frame and one block of logits must bear."""

MAX_ALIVE_SLOTS = 1024
"""The most slots that are not committed. A prompt chunk commits its own; speculation keeps some hundred in flight."""
