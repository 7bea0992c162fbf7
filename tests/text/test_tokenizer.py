from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_tokenizers import CORPUS, PIPELINES, TEMPLATE, write_folder

from farflung.core.errors import NotAModel, UnsupportedModel, UsageError
from farflung.text.tokenizer import Tokenizer

CHAT = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": 'Grüße\n"quoted" </s>'}]


def folder_of(tmp_path: Path, kind: str = "byte-level", template: str | None = TEMPLATE) -> Path:
    return write_folder(tmp_path / "model", PIPELINES[kind](), template)


def cached(folder: Path) -> Tokenizer:
    return Tokenizer(str(folder), {}, cache=folder.parent / "cache")


@pytest.mark.parametrize("kind", sorted(PIPELINES))
def test_ids_text_and_chats_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path, kind)
    ours, theirs = cached(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in [*CORPUS, "", " ", "  a <s>x</s>", "\ufffd\x00"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.encode_chat(CHAT) == theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)


def test_the_second_start_needs_no_transformers_and_gives_the_same_ids(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    first = cached(folder)
    script = (
        "import json, sys; from pathlib import Path; from farflung.text.tokenizer import Tokenizer;"
        f"tokenizer = Tokenizer({str(folder)!r}, {{}}, cache=Path({str(folder.parent / 'cache')!r}));"
        f"print(json.dumps([tokenizer.encode({CORPUS[2]!r}), tokenizer.encode_chat({CHAT!r}), 'transformers' in sys.modules,"
        " 'torch' in sys.modules]))"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert found == [first.encode(CORPUS[2]), first.encode_chat(CHAT), False, False]


def test_a_changed_file_is_not_served_from_the_cache(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "byte-level")
    before = cached(folder).encode("the dog")
    write_folder(folder, PIPELINES["sentencepiece"](), TEMPLATE)
    assert cached(folder).encode("the dog") != before


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"cut"])
def test_a_damaged_cache_is_built_anew(damage: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    ids = cached(folder).encode(CORPUS[0])
    (place,) = (tmp_path / "cache").iterdir()
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2] if damage == b"cut" else damage)
    assert cached(folder).encode(CORPUS[0]) == ids
    assert place.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert cached(folder_of(tmp_path)).encode("the")


def test_generation_config_names_all_ends_of_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    tokenizer = cached(folder)
    assert tokenizer.eos_token_ids == (1, 5, 7)  # 1 is </s>, of the tokenizer itself


def test_a_base_model_refuses_to_chat_and_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = cached(folder_of(tmp_path, template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="base model") as caught:
        tokenizer.encode_chat(CHAT)
    assert "use generate" in caught.value.hint


def test_half_a_surrogate_pair_is_refused_by_its_place(small: Tokenizer) -> None:
    with pytest.raises(UsageError, match="character 2"):
        small.encode("ab\ud83d")
    with pytest.raises(UsageError, match="surrogate"):
        small.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_a_template_refuses_messages_by_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tools"):
        cached(folder_of(tmp_path)).encode_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.keys() }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(attack: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refuses these"):
        cached(folder_of(tmp_path, template=attack)).encode_chat(CHAT)


@pytest.mark.parametrize(
    "fault",
    [
        "{{ 1 / 0 }}",
        "{{ 2.0**100000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10**15 }}",
        "{{ cycler().next() }}",
        "{{ messages|tojson(indent=10**9) }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_ours(fault: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refuses these"):
        cached(folder_of(tmp_path, template=fault)).encode_chat(CHAT)


def test_a_template_gets_its_date_from_the_clock_it_was_given(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, template="{{ strftime_now('%Y') }}{% generation %}!{% endgeneration %}")
    noon = datetime(1999, 6, 1, 12, tzinfo=UTC).timestamp()
    tokenizer = Tokenizer(str(folder), {}, cache=tmp_path / "cache", clock=lambda: noon)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "1999!"


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"])
def test_a_template_that_does_not_compile_is_a_fault_of_the_model(source: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="chat template"):
        cached(folder_of(tmp_path, template=source)).encode_chat(CHAT)


@pytest.mark.parametrize("text", ["", '{"model": {', "[]", '{"a": 1}'])
def test_a_damaged_tokenizer_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(NotAModel, match=r"tokenizer\.json"):
        cached(folder)


def test_a_folder_without_tokenizer_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NotAModel, match="no tokenizer") as caught:
        Tokenizer(str(tmp_path), {}, cache=tmp_path / "cache")
    assert caught.value.hint


def test_code_that_came_with_a_tokenizer_is_never_run_even_where_a_terminal_could_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: ...\n")
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "code.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with suppress(NotAModel):
        cached(folder)
    assert not (tmp_path / "ran").exists()


def test_a_gguf_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(8) + (5).to_bytes(8, "little"))
    with pytest.raises(NotAModel, match=r"cut\.gguf"):
        Tokenizer(str(tmp_path), {"gguf_file": "cut.gguf"}, cache=tmp_path / "cache")
