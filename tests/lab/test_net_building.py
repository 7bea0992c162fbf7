"""The emulator is built on first use; where that cannot be, the error says why and what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from farflung.core.errors import LabUnavailable, UsageError
from farflung.lab.net.building import SOURCES, emulator_binary
from farflung.lab.net.registry import lab_folder


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip(f"the emulated network needs Linux; this is {sys.platform}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_sources_are_part_of_the_package() -> None:
    assert {path.name for path in SOURCES.iterdir()} >= {"wan.h", "main.c", "traffic.c", "nat.c", "spaces.c", "control.c"}


def test_without_a_compiler_the_error_says_so_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LabUnavailable, match="there is no C compiler") as caught:
        emulator_binary()
    assert "apt install build-essential" in caught.value.hint


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'wan.h: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(LabUnavailable, match="no such header"):
        emulator_binary()
    assert not [path for path in tmp_path.rglob("wan-*") if path.is_file()]


def test_elsewhere_than_on_linux_the_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LabUnavailable, match="needs Linux; this is darwin"):
        emulator_binary()


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 41])
def test_a_name_that_would_leave_the_folder_is_no_name_of_a_lab(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a lab"):
        lab_folder(name)
