"""``farflung lab simulate``: a scenario on a virtual clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import command

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()


@app.command(
    epilog=examples(
        "farflung lab simulate scenarios/fiber-70b.toml",
        "farflung lab simulate scenarios/thousand-nodes.toml --seed 7 --json | jq '.rows[] | select(.rung == \"simulate\")'",
    )
)
def simulate(
    *,
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="Swarm, model, load and faults.")],
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the scenario's: another run of it.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a scenario on a virtual clock: our real directory, nodes and drivers, a simulated network, no model.

    Stages take time by a T-curve, links by delay, rate, jitter and loss; tokens come from recorded texts or a hash, and each is
    checked. The same seed gives the same rows. Beside each stands what the planner expects of one such session alone.
    """
    with command(json=json, debug=debug) as out:
        from msgspec.structs import replace

        from farflung.lab.rows import rows_of
        from farflung.lab.scenario import read_scenario
        from farflung.lab.simulate import simulate as run

        wanted = read_scenario(scenario)
        if seed is not None:
            wanted = replace(wanted, seed=seed)
        done = run(wanted)
        rows = rows_of(wanted, done)
        out.json({"rows": rows, "virtual_s": round(done.virtual_s, 6), "real_s": round(done.real_s, 3)})
        if not json:
            out.print(_table(rows))
            out.print(f"{done.virtual_s:.1f} s on the virtual clock took {done.real_s:.1f} s; seed {wanted.seed}")


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(
        "load", "rung", "sessions", "failed", "tokens/s", "ms/token", "p95", "x floor", "ttft s", "x floor", "same tokens"
    )
    for row in rows:
        times = row.get("inter_token_ms", {})
        cells = (
            row["load"],
            row["rung"],
            row["sessions"],
            row.get("failed"),
            row.get("tokens_per_s"),
            times.get("p50"),
            times.get("p95"),
            row.get("floor_ratio"),
            row.get("ttft_s"),
            row.get("ttft_floor_ratio"),
            row.get("same_tokens"),
        )
        table.add_row(*("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table
