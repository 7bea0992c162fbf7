"""``farflung doctor``: what is wrong here and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.cli.admission import SwarmKeyOption
from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import FAILED, Output, command

if TYPE_CHECKING:
    from farflung.cli.checks import Check

app = typer.Typer()


@app.command(epilog=examples("farflung doctor", "farflung doctor --directory http://10.0.0.5:7700 --json"))
def doctor(
    *,
    directory: Annotated[
        str, typer.Option("--directory", "-d", metavar="URL", help="Also check this directory and its clock.")
    ] = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Also check that this address can be listened on.")
    ] = "127.0.0.1:0",
    swarm_key: SwarmKeyOption = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that this machine can run Farflung; say what is wrong and how to mend it.

    Looks at Python, torch, the processor, memory, folders, a real encrypted link over loopback, ports, the swarm key, models
    and the clock. Ends with 1 where something is wrong.
    """
    with command(json=json, debug=debug) as out:
        from farflung.cli.checks import all_checks

        found: list[Check] = []
        for check in all_checks(directory, listen, swarm_key):
            found.append(check)
            _show(out, check)
        out.json({"checks": [asdict(check) for check in found]})
        wrong = [check.name for check in found if not check.ok]
        if wrong:
            out.note(f"{len(wrong)} of {len(found)} checks failed: {', '.join(wrong)}")
            raise typer.Exit(FAILED)
        out.note(f"all {len(found)} checks passed")


def _show(out: Output, check: Check) -> None:
    from rich.text import Text

    mark = ("ok  ", "green") if check.ok else ("bad ", "bold red")
    out.print(Text.assemble(mark, f"{check.name:<12} ", check.detail))
    if check.hint:
        out.print(Text.assemble(" " * 17, ("hint: ", "cyan"), check.hint))
