"""``farflung config``: which defaults hold here, and where each one stands."""

from __future__ import annotations

import os
from typing import cast

import typer

from farflung.cli.config import Defaults, unused_variables
from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import command

app = typer.Typer(name="config", no_args_is_help=True, help="Where defaults of options come from.")


@app.command(
    epilog=examples(
        "farflung config show",
        "FARFLUNG_DIRECTORY=http://10.0.0.5:7700 farflung config show",
        "In farflung.toml, table 'all': directory = 'http://10.0.0.5:7700'; table 'node': threads = 2",
    )
)
def show(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Print every default set by farflung.toml or FARFLUNG_* variables, and where it stands.

    The command line comes first, then FARFLUNG_COMMAND_OPTION, then FARFLUNG_OPTION, then farflung.toml in this folder, then
    farflung.toml in your configuration folder. In a file, options stand in a table named like their command, or in
    one named 'all'. FARFLUNG_DEFAULTS=off leaves files and variables out.
    """
    with command(json=json, debug=debug) as out:
        defaults = cast(Defaults, context.obj)
        rows = [
            {"command": " ".join(path), "option": name, "value": setting.shown(name), "origin": setting.origin}
            for path, options in defaults.settings.items()
            for name, setting in sorted(options.items())
        ]
        unused = unused_variables(os.environ, defaults.schema)
        out.json({"settings": rows, "unused_variables": unused})
        if not rows:
            out.note("no defaults are set: neither farflung.toml nor FARFLUNG_* variables say anything")
        else:
            from rich.table import Table

            table = Table("command", "option", "value", "comes from", box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(str(row[key]) for key in ("command", "option", "value", "origin")))
            out.print(table)
        if unused:
            out.note(f"no option is named by {', '.join(unused)}")
