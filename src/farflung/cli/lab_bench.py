"""``farflung lab bench``: suites over the emulated network."""

from __future__ import annotations

import asyncio
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import Output, command
from farflung.cli.stopping import cancelled_by_sigterm
from farflung.core.errors import UsageError

if TYPE_CHECKING:
    from farflung.lab.bench.case import Case

app = typer.Typer()

SUITES = {"decode": 64, "prefill": 512, "many": 64}
"""And the length of their prompts where nothing else is asked for."""


@app.command(
    epilog=examples(
        "farflung lab bench decode --net fiber,cable --backend real --stages 3 --model gemma3-270m --out out",
        "farflung lab bench decode --backend replay --stages 4 --rung plan,simulate,emulate",
        "farflung lab bench decode --rtt-ms 80 --up-mbps 10 --backend replay --json | jq '.rows[].floor_ratio'",
    )
)
def bench(
    *,
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", help="decode: time between tokens; prefill: to the first one; many: sessions together."
        ),
    ],
    net: Annotated[
        str,
        typer.Option("--net", metavar="PROFILE,...", help="Networks; without it fiber, cable, 5g and intercontinental."),
    ] = "",
    rtt_ms: Annotated[float, typer.Option("--rtt-ms", min=0, help="Instead of --net: round trip between members.")] = 0.0,
    up_mbps: Annotated[float, typer.Option("--up-mbps", min=0, help="Instead of --net: uplink; 0 is unlimited.")] = 0.0,
    down_mbps: Annotated[float, typer.Option("--down-mbps", min=0, help="Instead of --net: downlink.")] = 0.0,
    jitter_pct: Annotated[float, typer.Option("--jitter-pct", min=0, help="Of the round trip.")] = 0.0,
    loss_pct: Annotated[float, typer.Option("--loss-pct", min=0, max=100, help="In each direction.")] = 0.0,
    backend: Annotated[str, typer.Option("--backend", help="real stages, or replay: a 70B model's times and bytes.")] = "real",
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="As for farflung node; a name for replay.")] = "",
    stages: Annotated[int, typer.Option("--stages", min=1, max=64, help="Nodes that share the layers.")] = 4,
    dtype: Annotated[str, typer.Option("--dtype", help="Of real stages.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of each real stage.")] = 1,
    codec: Annotated[str, typer.Option("--codec", help="Between stages.")] = "int8",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=0, help="0: 64, and 512 for prefill.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Decoded in each repeat, after a warm-up.")] = 64,
    many_case: Annotated[
        str,
        typer.Option("--case", metavar="CASE", help="Of many: together, or head-of-line, one beside another's long prompt."),
    ] = "together",
    sessions: Annotated[int, typer.Option("--sessions", min=1, max=512, help="Together, in the suite many.")] = 8,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Medians are reported, with the least and the most.")] = 3,
    traces: Annotated[Path | None, typer.Option("--traces", metavar="DIR", help="Recorded paths for replay.")] = None,
    rung: Annotated[str, typer.Option("--rung", metavar="RUNG,...", help="plan, simulate, emulate, side by side.")] = "emulate",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of prompts, jitter and losses.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Also write JSON, Markdown and SVG there.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a suite over emulated networks: a directory, nodes and a driver as processes, each with an address of its own.

    Every row stands beside its floor: one-way delays, serialisation and stage compute. Run it alone on the machine.
    """
    with command(json=json, debug=debug) as output:
        from farflung.lab.bench.case import REPLAY_MODEL, Case, connections

        if suite not in SUITES:
            raise UsageError(f"there is no suite {suite[:40]!r}", hint=f"there are {', '.join(SUITES)}")
        if many_case not in ("together", "head-of-line") or (suite != "many" and many_case != "together"):
            raise UsageError(f"{suite} has no case {many_case[:40]!r}", hint="many has together and head-of-line")
        rungs = _rungs(rung, suite)
        kind = many_case if many_case == "head-of-line" else suite
        by_hand = {
            "rtt_ms": rtt_ms,
            "up_mbps": up_mbps,
            "down_mbps": down_mbps,
            "jitter_pct": jitter_pct,
            "loss_pct": loss_pct,
        }
        cases = [
            Case(
                net=name,
                connection=connection,
                backend=backend,
                model=model or (REPLAY_MODEL if backend == "replay" else "gemma3-270m"),
                stages=stages,
                dtype=dtype,
                threads=threads,
                codec=codec,
                prompt_tokens=prompt_tokens or SUITES[suite],
                tokens=tokens,
                sessions=sessions,
                repeats=repeat,
                seed=seed,
                traces=traces.resolve() if traces is not None else None,
                by_hand={key: value for key, value in by_hand.items() if value},
            )
            for name, connection in connections(net, by_hand)
        ]
        rows = asyncio.run(_run(output, kind, cases, rungs))
        output.json({"suite": suite, "rows": rows})
        _write(output, kind, cases[0], rows, out)


def _rungs(words: str, suite: str) -> list[str]:
    from farflung.lab.bench.rungs import RUNGS

    asked = words.split(",")
    if unknown := [rung for rung in asked if rung not in RUNGS]:
        raise UsageError(f"there is no rung {unknown[0][:40]!r}", hint=f"there are {', '.join(RUNGS)}")
    if suite not in ("decode", "prefill") and asked != ["emulate"]:
        raise UsageError(f"the suite {suite} is emulated only", hint="the virtual clock has 'farflung lab simulate'")
    return [rung for rung in RUNGS if rung in asked]


async def _run(out: Output, suite: str, cases: list[Case], rungs: list[str]) -> list[dict[str, Any]]:
    from farflung.lab.bench.decode import decode
    from farflung.lab.bench.many import head_of_line, many
    from farflung.lab.bench.prefill import prefill
    from farflung.lab.bench.rungs import plan_row, replayed, simulate_row, with_ratios

    measure = {"decode": decode, "prefill": prefill, "many": many, "head-of-line": head_of_line}[suite]
    rows: list[dict[str, Any]] = []
    async with cancelled_by_sigterm():
        for case in cases:
            found: dict[str, dict[str, Any]] = {}
            known = None
            if "emulate" in rungs:  # first: the others are told what it measured
                found["emulate"], known = await measure(case, lambda what, case=case: out.note(f"{case.net}: {what} ..."))  # type: ignore[misc]
            if "plan" in rungs:
                found["plan"] = plan_row(suite, case, known or replayed(suite, case))
            if "simulate" in rungs:
                out.note(f"{case.net}: simulating ...")
                found["simulate"] = await asyncio.to_thread(simulate_row, suite, case, known or replayed(suite, case))
            rows += with_ratios(suite, [found[rung] for rung in rungs])
    return rows


def _write(out: Output, suite: str, case: Case, rows: list[dict[str, Any]], folder: Path | None) -> None:
    from farflung.lab.bench import report

    table_of, plot_of = {
        "decode": (report.decode_table, report.decode_plot),
        "prefill": (report.prefill_table, report.prefill_plot),
        "many": (report.many_table, report.many_plot),
        "head-of-line": (report.head_of_line_table, report.head_of_line_plot),
    }[suite]
    table = table_of(rows)
    out.write(table)
    if folder is None:
        return
    title = f"{case.model}, {case.stages} stages, {case.backend}: {suite}"
    files = {
        "json": json_format.dumps({"suite": suite, "rows": rows}, indent=1) + "\n",
        "md": table,
        "svg": plot_of([row for row in rows if row["rung"] == rows[-1]["rung"]], title),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in files.items():
            (folder / f"{suite}-{case.backend}.{ending}").write_text(text)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    out.note(f"written to {folder}: " + ", ".join(f"{suite}-{case.backend}.{ending}" for ending in files))
