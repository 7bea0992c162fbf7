"""Defaults of options from files and variables: what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.cli.app import option_names
from farflung.cli.config import Settings, as_default_map, gather, unused_variables, variable
from farflung.core.errors import ConfigError

SCHEMA = {
    ("node",): frozenset({"directory", "threads", "kv_tokens"}),
    ("generate",): frozenset({"directory", "max_tokens"}),
    ("directory",): frozenset({"listen"}),
    ("bench", "stage"): frozenset({"model"}),
}


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "farflung.toml"
    file.write_text(text, encoding="utf-8")
    return file


def value(settings: Settings, command: str, option: str) -> object:
    return settings[tuple(command.split())][option].value


def test_what_is_nearer_to_the_call_wins(tmp_path: Path) -> None:
    user = write(tmp_path / "user", "[all]\ndirectory = 'user-all'\n[node]\nthreads = 1\nkv_tokens = 1\n")
    here = write(tmp_path / "here", "[node]\nthreads = 2\nkv-tokens = 2\n")
    environ = {"FARFLUNG_KV_TOKENS": "3", "FARFLUNG_DIRECTORY": "variable", "FARFLUNG_NODE_DIRECTORY": "of-node"}
    settings = gather([user, here], environ, SCHEMA)
    assert value(settings, "node", "threads") == 2
    assert value(settings, "node", "kv_tokens") == "3"
    assert value(settings, "node", "directory") == "of-node"
    assert value(settings, "generate", "directory") == "variable"
    assert settings[("node",)]["threads"].origin == f"{here} [node] threads"
    assert settings[("node",)]["directory"].origin == "FARFLUNG_NODE_DIRECTORY"


def test_a_table_of_a_command_is_nearer_than_the_table_for_all(tmp_path: Path) -> None:
    file = write(tmp_path, "[node]\ndirectory = 'node'\n[all]\ndirectory = 'all'\n")
    settings = gather([file], {}, SCHEMA)
    assert value(settings, "node", "directory") == "node"
    assert value(settings, "generate", "directory") == "all"


def test_the_directory_command_and_the_directory_option_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    file = write(tmp_path, "[all]\ndirectory = 'http://d'\n[directory]\nlisten = '0.0.0.0:1'\n")
    settings = gather([file], {}, SCHEMA)
    assert value(settings, "directory", "listen") == "0.0.0.0:1"
    assert value(settings, "generate", "directory") == "http://d"


def test_tables_of_nested_commands_become_nested_defaults(tmp_path: Path) -> None:
    settings = gather([write(tmp_path, "[bench.stage]\nmodel = 'm'\n")], {}, SCHEMA)
    assert as_default_map(settings)["bench"] == {"stage": {"model": "m"}}


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ("[node]\nthread = 2\n", "node.thread", "threads"),
        ("[nodes]\nthreads = 2\n", "nodes", "node"),
        ("[all]\ndirektory = 'x'\n", "all.direktory", "directory"),
        ("directory = 'http://d'\n", "directory", "[all]"),
        ("all = 1\n", "'all'", "[all]"),
        ("[node]\nthreads = [1]\n", "node.threads", ""),
        ("[node\n", "not valid TOML", "toml.io"),
    ],
)
def test_a_key_that_means_nothing_is_refused_by_name_with_a_suggestion(
    tmp_path: Path, text: str, named: str, hint: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        gather([file], {}, SCHEMA)
    assert str(file) in caught.value.message
    assert named in caught.value.message
    assert hint in caught.value.hint


def test_bytes_that_are_no_text_are_refused_by_file(tmp_path: Path) -> None:
    file = tmp_path / "farflung.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"farflung\.toml cannot be read"):
        gather([file], {}, SCHEMA)


def test_a_misspelt_variable_is_reported_and_a_strangers_is_left_alone() -> None:
    environ = {"FARFLUNG_NODE_THREDS": "1", "FARFLUNG_THREADS": "1", "PATH": "/bin", "FARFLUNG_DEFAULTS": "off"}
    assert unused_variables(environ, SCHEMA) == ["FARFLUNG_NODE_THREDS"]


@given(st.sampled_from(sorted(SCHEMA)), st.text(max_size=20))
def test_every_option_of_every_command_has_a_variable_that_sets_it(path: tuple[str, ...], text: str) -> None:
    for option in SCHEMA[path]:
        settings = gather([], {variable("_".join(path), option): text}, SCHEMA)
        assert settings[path][option].value == text


def test_no_command_is_named_like_an_option_of_its_parent() -> None:
    as_default_map({path: {} for path in option_names()})
    assert all("all" not in path for path in option_names())
