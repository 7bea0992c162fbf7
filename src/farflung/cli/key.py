"""``farflung key``: the key of a private swarm, and the key a driver is known by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import command

app = typer.Typer(name="key", no_args_is_help=True, help="Keys: of a private swarm, and of drivers that nodes let in.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="Where the key is kept.")]


@app.command(
    epilog=examples(
        "farflung key new swarm.key",
        "scp swarm.key 10.0.0.7:      (to every machine of the swarm, over something that is safe already)",
        "farflung node -m gemma3-270m --listen 0.0.0.0:7800 --swarm-key swarm.key",
    )
)
def new(file: File, *, json: Json = False, debug: Debug = False) -> None:
    """Make the key of a private swarm: 32 random bytes in FILE, for this user alone.

    Nodes and drivers that have it talk to each other and to nobody else. Whoever has it is in: to shut one out, make another
    key for the others.
    """
    with command(json=json, debug=debug) as out:
        from farflung.identity.swarm_key import SwarmKey

        key = SwarmKey.generate()
        key.write(file)
        out.json({"path": str(file), "fingerprint": key.fingerprint})
        out.print(f"{file}: a new swarm key, fingerprint {key.fingerprint}")
        out.note(f"copy it to every machine of the swarm; nodes and drivers take it with --swarm-key {file}")


@app.command(epilog=examples("farflung key show swarm.key", 'FARFLUNG_SWARM_KEY="$(farflung key show swarm.key --reveal)"'))
def show(
    file: File,
    *,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the key itself, for FARFLUNG_SWARM_KEY.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the fingerprint of a swarm key: two machines with the same one have the same key."""
    with command(json=json, debug=debug) as out:
        from farflung.identity.swarm_key import SwarmKey

        key = SwarmKey.read(file)
        out.json({"path": str(file), "fingerprint": key.fingerprint} | ({"key": key.text} if reveal else {}))
        out.print(key.text if reveal else key.fingerprint)


@app.command("id", epilog=examples("farflung key id me.key", "farflung generate -m gemma3-270m --identity me.key Hello"))
def driver_id(file: File, *, json: Json = False, debug: Debug = False) -> None:
    """Print the id that nodes know a driver by: put it on the --allow list of each node. FILE is made where there is none."""
    with command(json=json, debug=debug) as out:
        from farflung.identity.keys import Identity

        identity = Identity.load_or_create(file)
        out.json({"path": str(file), "id": identity.node_id})
        out.print(identity.node_id)
