"""The documentation holds: links lead somewhere, commands and options exist, Python examples run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from local_nodes import add_tokenizer, served
from models import tiny_model
from typer.testing import CliRunner

from farflung.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def links() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        found += [(page.name, target) for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())]
    return [(page, target) for page, target in found if "://" not in target]


@pytest.mark.parametrize(("page", "target"), links())
def test_every_link_leads_to_a_file_of_the_repository(page: str, target: str) -> None:
    base = next(path for path in PAGES if path.name == page).parent
    assert (base / target).exists(), f"{page} links to {target}, which is not there"


def commands() -> list[str]:
    found: list[str] = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.S):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [line[2:] for line in lines if line.startswith("$ farflung")]
        found += re.findall(r"`(farflung [a-z][^`]*)`", page.read_text())
    return sorted(set(found))


def test_the_documentation_shows_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_in_the_documentation_exists(command: str) -> None:
    words = shlex.split(command.split(" | ", maxsplit=1)[0])[1:]
    group = typer.main.get_command(app)
    path: list[str] = []
    while words and not words[0].startswith("-") and words[0] in getattr(group, "commands", {}):
        path.append(words.pop(0))
        group = group.commands[path[-1]]  # type: ignore[attr-defined]
    assert path or words[0].startswith("-"), f"{command!r} is no command"
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in result.output, f"{' '.join(path)} has no {option}"


def test_every_message_that_operations_explains_is_one_that_the_code_says() -> None:
    source = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    table = (ROOT / "docs/operations.md").read_text().split("| message |")[1]
    messages = re.findall(r"^\| `([^`]+)` \|", table, flags=re.M)
    assert len(messages) > 5
    for message in messages:
        for words in message.split("..."):
            assert words.strip(" ,()") in source, message


def test_every_floor_of_the_architecture_page_is_a_package_and_every_package_is_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"\(\.\./src/farflung/([a-z]+)\)", text))
    there = {path.parent.name for path in (ROOT / "src/farflung").glob("*/__init__.py")}
    assert named == there


def python_examples() -> list[str]:
    return [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]


def test_every_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As written, but for where the directory is and which model it serves."""
    model = add_tokenizer(tiny_model("llama", tmp_path / "model", layers=4))
    assert len(python_examples()) == 2
    with served(model, cuts=(2,)) as url:
        for example in python_examples():
            text = example.replace("http://127.0.0.1:7700", url).replace("gemma3-270m", str(model))
            exec(compile(text, "README.md", "exec"), {})
            assert capsys.readouterr().out
