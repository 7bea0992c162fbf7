"""A list of node ids that are let in: what ``--allow`` names, as ids or as files of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from farflung.core.errors import ConfigError, NotAdmitted, UsageError
from farflung.core.ids import NodeId, parse_node_id, short

_ID = re.compile(r"[0-9A-Fa-f]{64}")
_FILE_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class AllowList:
    """Those who are let in. An empty list lets in nobody."""

    node_ids: frozenset[NodeId]

    @classmethod
    def read(cls, entries: Iterable[str]) -> AllowList:
        """The ids in ``entries``: an id each, or a file with one id per line, where ``#`` begins a comment.

        Raises ConfigError, which names the file and the line.
        """
        found: set[NodeId] = set()
        for entry in entries:
            if _ID.fullmatch(entry):
                found.add(parse_node_id(entry.lower()))
            else:
                found.update(_ids_in(Path(entry)))
        return cls(frozenset(found))

    def check(self, node_id: NodeId) -> None:
        """Raises NotAdmitted where ``node_id`` is not on the list."""
        if node_id not in self.node_ids:
            raise NotAdmitted(
                f"driver {short(node_id)} is not on this node's list of {len(self.node_ids)}",
                hint=f"let its operator add {node_id}; `farflung key id FILE` makes a key that stays, for --identity FILE",
            )


def _ids_in(path: Path) -> list[NodeId]:
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.read(_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"{str(path)!r} is neither a node id nor a list of them that can be read: {reason}",
            hint="an id has 64 hex digits; a list has one on each line, and comments after #",
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            found.append(parse_node_id(" ".join(words).lower()))
        except UsageError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}", hint="write comments after #") from error
    return found
