"""The command line: which commands there are, where their defaults come from, and how each run ends.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 on Ctrl-C. This module and the commands it lists import nothing heavy at the
top, so that ``farflung --help`` answers at once; torch and the rest come in when a command that needs them runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import platformdirs
import typer
import typer.main

from farflung import __version__
from farflung.cli import bench, chat, config_command, demo, directory, doctor, generate, key, lab, models, node, status
from farflung.cli.config import DEFAULTS, OFF, CommandPath, Defaults, Schema, Settings, as_default_map, config_files, gather
from farflung.cli.output import FAILED, INTERRUPTED, WRONG_USAGE, exit_code, print_error
from farflung.core.errors import FarflungError

app = typer.Typer(
    name="farflung",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: farflung demo",
)
for group in (demo, directory, node, generate, chat, status, models, key, bench, lab, doctor, config_command):
    app.add_typer(group.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farflung {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Run language models too big for any one machine across far-flung ones."""


def option_names() -> Schema:
    """The options of every command that a file or a variable may set."""
    found: dict[CommandPath, frozenset[str]] = {}
    _collect(typer.main.get_command(app), (), found)
    return found


def repeatable_options() -> Schema:
    """Those of the options that may be given several times: a default for them is a list."""
    found: dict[CommandPath, frozenset[str]] = {}
    _collect(typer.main.get_command(app), (), found, lambda parameter: bool(parameter.multiple))
    return found


def _collect(
    parsed: Any,
    path: CommandPath,
    found: dict[CommandPath, frozenset[str]],
    wanted: Callable[[Any], bool] = lambda _: True,
) -> None:
    commands = getattr(parsed, "commands", None)
    if commands is None:
        options = (p for p in parsed.params if p.param_type_name == "option" and not p.hidden and p.name != "help")
        found[path] = frozenset(p.name for p in options if wanted(p))
        return
    for name, inner in commands.items():
        _collect(inner, (*path, name), found, wanted)


def read_defaults() -> Defaults:
    """The defaults that hold here and now. Raises ConfigError."""
    schema = option_names()
    if os.environ.get(DEFAULTS) == OFF:
        return Defaults({path: {} for path in schema}, schema)
    files = config_files(Path.cwd(), platformdirs.user_config_path("farflung", appauthor=False))
    return Defaults(gather(files, os.environ, schema), schema)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; the exit code."""
    defaults = Defaults({}, {})
    try:
        defaults = read_defaults()
        done = typer.main.get_command(app).main(
            list(arguments),
            prog_name="farflung",
            standalone_mode=False,
            default_map=as_default_map(defaults.settings, repeatable_options()),
            obj=defaults,
        )
    except typer.TyperException as error:  # what the parser refused
        if message := error.format_message():  # empty where the help was asked for by saying nothing
            print_error(message, _usage_hint(error, defaults.settings))
        return WRONG_USAGE
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except FarflungError as error:
        print_error(error.message, error.hint)
        return exit_code(error)
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that the interpreter's last flush finds a place
        return FAILED
    return done if isinstance(done, int) else 0


def _usage_hint(error: Exception, settings: Settings) -> str:
    """Where a refused value was written, or which ``--help`` to read."""
    context = getattr(error, "ctx", None)
    if context is None:
        return ""
    path = tuple(context.command_path.split()[1:])
    name = getattr(getattr(error, "param", None), "name", None)
    setting = settings.get(path, {}).get(name) if name else None
    if setting is not None and str(context.get_parameter_source(name)).endswith("DEFAULT_MAP"):
        return f"the value {setting.value!r} comes from {setting.origin}"
    return f"'{context.command_path} --help' shows how"


def main() -> None:
    """The entry point of the ``farflung`` script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows '?', and the run goes on
    if "--debug" not in sys.argv:
        sys.excepthook = _tell_bug
    sys.exit(run(sys.argv[1:]))


def _tell_bug(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """What reaches the interpreter is none of our errors: a bug, or a machine out of memory or disk."""
    print_error(f"{kind.__name__}: {error}", "this should not happen; the same with --debug shows where")


if __name__ == "__main__":
    main()
