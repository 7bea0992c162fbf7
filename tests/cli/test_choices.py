"""Options whose values are words."""

from __future__ import annotations

import pytest

from farflung.cli.choices import CODECS, offered_codecs, parse_codecs
from farflung.core.errors import UsageError
from farflung.wire.codec import CODEC_NAMES


def test_the_command_line_knows_the_codecs_that_there_are() -> None:
    assert CODECS == CODEC_NAMES


def test_codecs_are_listed_in_order_of_preference() -> None:
    assert parse_codecs("int8") == ("int8",)
    assert parse_codecs("int8, int4") == ("int8", "int4")
    for wrong in ("", "int8,", "int9", "int8,int8"):
        with pytest.raises(UsageError, match="--codec"):
            parse_codecs(wrong)


def test_a_node_takes_the_codecs_named_and_all_finer_ones() -> None:
    assert offered_codecs(("fp32",)) == {"fp32"}
    assert offered_codecs(("int8",)) == {"fp32", "bf16", "int8"}
    assert offered_codecs(("int4", "bf16")) == set(CODEC_NAMES)
