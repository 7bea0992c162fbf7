"""docs/protocol.md says what the code does: every message and field in wire order, every limit, the bytes of the example."""

from __future__ import annotations

import importlib
import re
import types
import typing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from farflung.core import errors
from farflung.core.messages import Have, Message, OpenText, StageTime, Window
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions, TokenLogprob
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.sampling.noise import gumbel, noise_key, noise_words
from farflung.transport.link import Priority
from farflung.wire.codec import CODEC_NAMES, codec
from farflung.wire.fragment import fragments
from farflung.wire.frame import encode_frame

TEXT = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()
MESSAGES: tuple[type[msgspec.Struct], ...] = typing.get_args(Message)
PARTS: tuple[type[msgspec.Struct], ...] = (
    *(SlotSpan, SlotRun, Commit, StageTime, TokenLogprob, LayerRange, Hop, Route, OpenText),
)
UNITS = {"KiB": 2**10, "MiB": 2**20, "s": 1}


def block(kind: str) -> list[str]:
    (found,) = re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.S)
    return [line for line in found.splitlines() if line]


def table(first_column: str) -> list[list[str]]:
    """Rows of the table whose first heading that is, without heading and rule."""
    (found,) = re.findall(rf"^\| {first_column} \|.*?\n\|[-|]+\n(.*?)\n\n", TEXT + "\n\n", flags=re.M | re.S)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]


def documented() -> dict[str, tuple[str, str]]:
    """(tag, fields) of every message and part in the page, by name."""
    heading, *lines = block("messages")
    name_at, way_at, fields_at = (heading.index(word) for word in ("message", "from", "fields"))
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in lines:
        if started := line[name_at:way_at].strip():
            name = started
            found[name] = line[:name_at].strip(), line[fields_at:].strip()
        elif more := line[fields_at:].strip():
            tag, fields = found[name]
            found[name] = tag, f"{fields} {more}"
    return found


def shape(annotation: Any) -> str:
    if supertype := getattr(annotation, "__supertype__", None):
        return shape(supertype)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        if arguments[1:] == (...,):
            return f"{shape(arguments[0])}*"
        return f"({' '.join(map(shape, arguments))})"
    if isinstance(annotation, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return f"{shape(kind)}?"
    return str(annotation.__name__)


def value(default: object) -> str:
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f"{default:g}"
    return {"()": "[]", "b''": '""', "''": '""', "None": "nil", "False": "false"}[repr(default)]


def fields_of(kind: type[msgspec.Struct]) -> str:
    hints = typing.get_type_hints(kind)
    required = len(kind.__struct_fields__) - len(kind.__struct_defaults__)
    defaults = (None,) * required + kind.__struct_defaults__
    return ", ".join(
        f"{name} {shape(hints[name])}" + (f" = {value(default)}" if index >= required else "")
        for index, (name, default) in enumerate(zip(kind.__struct_fields__, defaults, strict=True))
    )


def test_the_page_names_every_message_and_no_other() -> None:
    assert set(documented()) == {kind.__name__ for kind in (*MESSAGES, *PARTS)}


@pytest.mark.parametrize("kind", MESSAGES + PARTS, ids=lambda kind: kind.__name__)
def test_fields_stand_in_the_page_in_wire_order_with_types_and_defaults(kind: type[msgspec.Struct]) -> None:
    assert documented()[kind.__name__][1] == fields_of(kind)
    assert kind.__struct_config__.array_like


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_tags_are_those_of_the_page(kind: type[msgspec.Struct]) -> None:
    assert documented()[kind.__name__][0] == str(kind.__struct_config__.tag)


def test_missing_defaults_at_the_end_and_more_elements_than_known_are_read_as_the_page_says() -> None:
    decoder = msgspec.msgpack.Decoder(Message)
    assert decoder.decode(msgspec.msgpack.encode([5, 1, []])) == Window(1, ())
    assert decoder.decode(msgspec.msgpack.encode([12, 1, 2, [[3, 4]], 5, "newer"])) == Have(1, 2, (SlotSpan(3, 4),), 5)


def test_sampling_options_are_a_map_without_defaults_and_the_page_names_each_with_its_default() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingOptions(top_k=5))) == {"top_k": 5}
    found: dict[str, str] = {}
    for names, defaults, _ in table("option"):
        found.update(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    expected = {field.name: value(field.default) for field in msgspec.structs.fields(SamplingOptions)}
    assert found == expected


@pytest.mark.parametrize("row", table("limit"), ids=lambda row: row[2])
def test_limits_are_those_of_the_code(row: list[str]) -> None:
    _, quoted, constant = row
    number, _, unit = quoted.partition(" ")
    module, found = "farflung", constant.strip("`").split(".")
    while not found[0][0].isupper():
        module += f".{found.pop(0)}"
    holder: Any = importlib.import_module(module)
    for name in found:
        holder = getattr(holder, name)
    assert float(number.replace(",", "")) * UNITS.get(unit, 1) == holder


def test_the_example_is_what_the_code_sends() -> None:
    documented_bytes = bytes.fromhex(" ".join(re.match(r"[0-9a-f ]+?(?=  )", line)[0] for line in block("hexdump")))  # type: ignore[index]
    window = Window(1, (SlotRun(7, 1, 6),), (SlotSpan(7, 1),), Commit(7, (SlotSpan(7, 1),)), 8)
    assert window.is_decode
    frame = encode_frame(window, (np.array([1234], "<i4").tobytes(),))
    (fragment,) = fragments(2, Priority.DECODE, frame)
    assert b"".join(fragment) == documented_bytes


def test_codecs_have_the_sizes_of_the_page() -> None:
    found = {name.strip("`"): int(size.replace(",", "")) for name, _, size in table("codec")}
    assert found == {name: codec(name).row_bytes(4096) for name in CODEC_NAMES}


def test_the_noise_of_the_page_is_that_of_the_code() -> None:
    ((seed, choice, position, token, k, noise),) = table("seed")
    words = noise_words(noise_key(int(seed), int(choice)), int(position), np.array([int(token)]))
    assert words.tolist() == [int(k, 16)]
    assert gumbel(words)[0] == pytest.approx(float(noise), rel=1e-13)


def test_every_message_error_and_structure_that_the_page_mentions_exists() -> None:
    known = {"SamplingOptions", *(kind.__name__ for kind in MESSAGES + PARTS)}
    known |= {name for name in vars(errors) if name[0].isupper()}
    mentioned = {name for name in re.findall(r"`([A-Z][A-Za-z]+)[`.]", TEXT) if not name.isupper()} - {"Quotas"}
    assert len(mentioned) > 20
    assert mentioned <= known
