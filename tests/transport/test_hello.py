"""Hellos: what two ends may use together."""

from __future__ import annotations

from farflung.core.messages import Hello
from farflung.transport.hello import FEATURES, HELLO, RESUME, common_features, hello_with
from farflung.wire.codec import MANDATORY_CODECS


def test_the_hello_names_every_mandatory_codec_and_each_feature_once() -> None:
    assert set(MANDATORY_CODECS) <= set(HELLO.codecs)
    assert len(set(FEATURES)) == len(FEATURES)


def test_only_features_that_both_ends_name_are_used() -> None:
    assert common_features(HELLO, HELLO) == set(FEATURES)
    assert common_features(HELLO, Hello((1, 1), (RESUME, "from a newer release"))) == {RESUME}
    assert common_features(HELLO, Hello((1, 1))) == set()


def test_a_node_that_takes_only_some_codecs_names_only_these() -> None:
    assert hello_with({"fp32", "from a newer release"}).codecs == ("fp32",)
    assert hello_with(HELLO.codecs) == HELLO
