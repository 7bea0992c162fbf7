"""``farflung lab``: networks to measure on, and what they say."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farflung.cli import lab_bench, lab_simulate
from farflung.cli.options import Debug, Json, examples
from farflung.cli.output import FAILED, Output, command
from farflung.cli.stopping import cancelled_by_sigterm
from farflung.core.errors import LabError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from farflung.lab.net.check import Figure
    from farflung.lab.net.emulator import Emulator
    from farflung.lab.net.topology import Topology

app = typer.Typer(name="lab", no_args_is_help=True, help="A wide-area network on this machine.")
for group in (lab_simulate, lab_bench):
    app.add_typer(group.app)

LabName = Annotated[str, typer.Option("--lab", metavar="NAME", help="Which lab, where several run side by side.")]
Settings = Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", show_default=False)]
DEFAULT_LAB = "default"
ALL_PROFILES = "infiniband,lan,fiber,cable,5g,intercontinental,cable+jittery,intercontinental+jittery,cable+lossy"


@app.callback()
def lab() -> None:
    """A wide-area network on this machine: real programs and real TCP, emulated links between them.

    Needs Linux and a C compiler (the emulator is built on first use), and root or unprivileged user namespaces.
    """


@app.command(
    epilog=examples(
        "farflung lab up fiber:2,cable",
        "farflung lab up cable+jittery:4 --lab mine",
        "farflung lab up wan.toml      (nodes, pairs, NAT: see docs/lab.md)",
    )
)
def up(
    *,
    topology: Annotated[str, typer.Argument(metavar="PROFILE[+MODE][:COUNT],...|FILE.toml", help="The nodes.")],
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Start a network that stays until 'farflung lab down'.

    Nodes are called n1, n2, ... and have the addresses 10.77.0.1, 10.77.0.2, ...; 'farflung lab profiles' lists what there is.
    """
    with command(json=json, debug=debug) as out:
        from farflung.lab.net.emulator import start
        from farflung.lab.net.registry import lab_folder

        emulator, _, complaints = start(lab_folder(lab), _topology(topology), lifeline=False)
        for complaint in complaints:
            out.note(f"not set in the nodes: {complaint}")
        _show(out, emulator)
        out.note("farflung lab exec NODE -- COMMAND runs something inside; farflung lab down ends it all")


@app.command(
    name="exec",
    epilog=examples(
        "farflung lab exec n1 -- ip address",
        "farflung lab exec n2 -- farflung directory --listen 10.77.0.2:7700",
    ),
)
def execute(
    *,
    node: Annotated[str, typer.Argument(metavar="NODE", show_default=False)],
    argv: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", show_default=False)],
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Become COMMAND inside a node: same terminal, same pid, same signals.

    It finds LAB_NODE, LAB_ADDRESS and LAB_ADDRESSES (JSON) in its environment, and must listen on 0.0.0.0 or its own address.
    """
    with command(json=json, debug=debug):
        emulator = _connect(lab)
        whole = emulator.command(node, argv)
        os.execve(whole[0], whole, {**os.environ, **emulator.environment(node)})  # noqa: S606


@app.command(epilog=examples("farflung lab status", "farflung lab status --json | jq .emulator.late_us_mean"))
def status(*, lab: LabName = DEFAULT_LAB, json: Json = False, debug: Debug = False) -> None:
    """Show the nodes of a lab, their settings and their traffic."""
    with command(json=json, debug=debug) as out:
        _show(out, _connect(lab))


@app.command(
    name="set",
    epilog=examples(
        "farflung lab set n3 up_mbps=1 rtt_ms=400",
        "farflung lab set all jitter_pct=50",
        "farflung lab set n1,n2 profile=5g+lossy",
    ),
)
def set_(
    *,
    nodes: Annotated[str, typer.Argument(metavar="NODE[,NODE]|all", show_default=False)],
    settings: Settings,
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Change how nodes are connected while everything runs.

    Keys: up_mbps down_mbps rtt_ms jitter_ms jitter_pct jitter_distribution jitter_correlation_ms loss_pct loss_burst keep_order
    queue_kb cut, or profile=NAME for all of them at once.
    """
    with command(json=json, debug=debug) as out:
        emulator = _connect(lab)
        names = list(emulator.places) if nodes == "all" else nodes.split(",")
        emulator.tell(*(_change(emulator.place(name).name, settings) for name in names))
        out.json({"lab": lab, "changed": names})


@app.command(epilog=examples("farflung lab link n1 n2 rtt_ms=250", "farflung lab link n1 n2 rtt_ms=-1 loss_pct=2"))
def link(
    *,
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    settings: Settings,
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Change what lies between two nodes, both ways.

    Keys: base_rtt_ms (added to the nodes' own), rtt_ms (instead of it; -1: no longer), loss_pct, cut.
    """
    with command(json=json, debug=debug) as out:
        from farflung.lab.net.topology import check_pair

        pairs = [word.partition("=") for word in settings]
        _set_pair(out, lab, a, b, dict(check_pair({key: value for key, _, value in pairs})))


@app.command(epilog=examples("farflung lab cut n1 n2", "farflung lab cut n3"))
def cut(
    *,
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="[B]", show_default=False)] = "",
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let nothing pass between two nodes, or to and from one."""
    with command(json=json, debug=debug) as out:
        _set_pair(out, lab, a, b, {"cut": 1})


@app.command(epilog=examples("farflung lab heal n1 n2", "farflung lab heal n3"))
def heal(
    *,
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="[B]", show_default=False)] = "",
    lab: LabName = DEFAULT_LAB,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """End a cut."""
    with command(json=json, debug=debug) as out:
        _set_pair(out, lab, a, b, {"cut": 0})


@app.command(epilog=examples("farflung lab down", "farflung lab down --all"))
def down(
    *,
    lab: LabName = DEFAULT_LAB,
    every: Annotated[bool, typer.Option("--all", help="Every lab of this user, running or left by a crash.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """End a lab: what runs inside is killed, the network goes. Also sweeps what a crash left."""
    with command(json=json, debug=debug) as out:
        from farflung.lab.net.registry import all_folders, lab_folder

        folders = all_folders() if every else [lab_folder(lab)]
        swept = {folder.name: folder.sweep() for folder in folders if folder.path.exists()}
        out.json({"labs": list(swept), "left_behind": sorted(pid for pids in swept.values() for pid in pids)})
        for name, pids in swept.items():
            out.print(f"lab {name} is down" + (f"; {len(pids)} processes that a crash had left are ended" if pids else ""))
        if not swept:
            out.print("no lab is up")


@app.command(epilog=examples("farflung lab profiles", "farflung lab profiles --json | jq .profiles.fiber"))
def profiles(*, json: Json = False, debug: Debug = False) -> None:
    """List the profiles and modes there are."""
    with command(json=json, debug=debug) as out:
        from dataclasses import asdict

        from farflung.lab.net.profiles import MODES, PROFILES

        out.json(
            {
                "profiles": {name: asdict(profile) for name, profile in PROFILES.items()},
                "modes": {name: dict(mode) for name, mode in MODES.items()},
            }
        )
        table = _new_table("profile", "up Mbps", "down Mbps", "round trip ms", "jitter ms")
        for name, profile in PROFILES.items():
            rates = [_rate(profile.up_mbps), _rate(profile.down_mbps)]
            table.add_row(name, *rates, f"{profile.rtt_ms:g}", f"{profile.jitter_ms:g}")
        out.print(table)
        out.print("modes: +jittery (half of the round trip, lognormal), +lossy (0.5% of the packets, each way)")


@app.command(
    epilog=examples("farflung lab check", "farflung lab check fiber,cable+lossy --json | jq '.rows[] | select(.ok | not)'")
)
def check(
    *,
    wanted: Annotated[str, typer.Argument(metavar="[PROFILE[+MODE],...]", show_default=False)] = ALL_PROFILES,
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=60, help="For each measurement of a rate.")] = 4.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that emulated networks are what they were asked to be: round trip, jitter, loss and rate.

    Measures each profile between two nodes, some 15 s a profile; run it alone on the machine. Ends with 1 where one is wrong.
    """
    with command(json=json, debug=debug) as out:
        rows = asyncio.run(_check(out, wanted.split(","), seconds))
        out.json({"rows": rows})
        wrong = [row["net"] for row in rows if not row["ok"]]
        if wrong:
            out.note(f"not as asked: {', '.join(wrong)}; other work on this machine is the usual reason")
            raise typer.Exit(FAILED)


async def _check(out: Output, names: list[str], seconds: float) -> list[dict[str, Any]]:
    from farflung.lab.net.check import check_profile
    from farflung.lab.net.profiles import named_connection

    for name in names:
        named_connection(name)  # a wrong name is told before a minute of measuring
    rows = []
    async with cancelled_by_sigterm():
        for name in names:
            with out.status(f"measuring {name}"):
                figures, also = await check_profile(name, seconds)
            out.print(_figures(name, figures, also))
            told = {f.name: {"asked": round(f.asked, 3), "measured": round(f.measured, 3), "ok": f.ok} for f in figures}
            rows.append({"net": name, "ok": all(figure.ok for figure in figures), **told, **also})
    return rows


def _figures(name: str, figures: list[Figure], also: dict[str, Any]) -> Table:
    table = _new_table(name, "asked", "measured", "within", "")
    for figure in figures:
        numbers = (f"{figure.asked:.2f}", f"{figure.measured:.2f}", f"{figure.tolerance:.2f}")
        table.add_row(figure.name, *numbers, "ok" if figure.ok else "WRONG")
    table.add_row("tcp_mbps", "", f"{also['tcp_mbps']:.1f}", "", "")
    return table


def _change(node: str, settings: list[str]) -> str:
    from farflung.lab.net.profiles import named_connection, parse_settings
    from farflung.lab.net.program import change_line, full_change

    profile = next((word.removeprefix("profile=") for word in settings if word.startswith("profile=")), "")
    rest = parse_settings(word for word in settings if not word.startswith("profile="))
    if "nat" in rest:
        raise UsageError("nat cannot change while a lab runs", hint="give it in the topology file of 'farflung lab up'")
    if not profile:
        return change_line(node, rest)
    if rest:
        raise UsageError("profile= replaces every setting", hint="give it alone, and the others in a second command")
    return full_change(node, profile, named_connection(profile))


def _set_pair(out: Output, lab: str, a: str, b: str, settings: dict[str, float]) -> None:
    """``cut`` of one node where ``b`` is empty."""
    from farflung.lab.net.program import change_line, pair_line

    emulator = _connect(lab)
    names = [emulator.place(name).name for name in (a, b) if name]
    emulator.tell(pair_line(names[0], names[1], settings) if b else change_line(names[0], settings))
    out.json({"lab": lab, "changed": names})


def _topology(words: str) -> Topology:
    from farflung.lab.net.topology import parse_topology, read_topology

    if words.endswith(".toml") or "/" in words:
        return read_topology(Path(words))
    return parse_topology(words)


def _connect(lab: str) -> Emulator:
    from farflung.lab.net.emulator import connect
    from farflung.lab.net.registry import all_folders, lab_folder

    try:
        return connect(lab_folder(lab))
    except LabError as error:
        others = [folder.name for folder in all_folders() if folder.pid is not None and folder.name != lab]
        if others and not lab_folder(lab).path.exists():
            raise LabError(error.message, hint=f"there are {', '.join(others)}: name one with --lab") from None
        raise


def _show(out: Output, emulator: Emulator) -> None:
    stats = emulator.stats()
    nodes = [
        {"id": name, "address": place.address, "public": place.public, "nat": place.nat, **stats["nodes"][name]}
        for name, place in emulator.places.items()
    ]
    about = {**stats["emulator"], "user_namespace": emulator.user_namespace}
    out.json({"lab": emulator.folder.name, "nodes": nodes, "cuts": stats["cuts"], "emulator": about})
    table = _new_table("node", "address", "net", "up/down", "rtt", "jitter", "loss", "dropped")
    for node in nodes:
        behind = f" ({node['nat']} at {node['public']})" if node["nat"] != "none" else ""
        jitter = f"{node['jitter_pct']:g}%" if node["jitter_pct"] else f"{node['jitter_ms']:g} ms"
        table.add_row(
            f"{node['id']}{' CUT' if node['cut'] else ''}",
            node["address"] + behind,
            node["label"],
            f"{_rate(node['up_mbps'])}/{_rate(node['down_mbps'])} Mbps",
            f"{node['rtt_ms']:g} ms",
            jitter,
            f"{node['loss_pct']:g}%",
            f"{sum(node['drops'].values())}",
        )
    out.print(table)
    for a, b in stats["cuts"]:
        if a < b or [b, a] not in stats["cuts"]:
            out.print(f"cut: {a} {b}")
    if about["scheduling"] in ("none", "nice"):
        out.note("the emulator has no precedence over other programs: leave the machine quiet while measuring")


def _new_table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(titles[0], box=None, pad_edge=False)
    for title in titles[1:]:
        table.add_column(title, justify="right")
    return table


def _rate(mbps: float) -> str:
    return f"{mbps:g}" if mbps else "∞"
