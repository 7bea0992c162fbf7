"""Rows of a benchmark as a Markdown table and as a picture. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]

BAR, GAP, LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 44, 62, 64, 24, 64, 34, 260
INK, PAPER, FAINT, FILL, FLOOR = "#1f2937", "#ffffff", "#e5e7eb", "#2563eb", "#dc2626"


def name_of(row: Row) -> str:
    """What to call a row's network."""
    return str(row.get("net") or " ".join(f"{key}={row[key]:g}" for key in ("rtt_ms", "up_mbps") if key in row))


def decode_table(rows: Sequence[Row]) -> str:
    """The suite ``decode`` in Markdown."""
    titles = ("tokens/s", "ms/token p50", "p95", "floor ms", "x floor", "bytes/value", "stages ms")
    return _table(rows, titles, _decode_cells)


def _decode_cells(row: Row) -> tuple[str, ...]:
    times = row["inter_token_ms"]
    return (
        f"{row['tokens_per_s']:.2f}",
        f"{times['p50']:.1f}" + (f" ({times['min']:.1f}-{times['max']:.1f})" if "min" in times else ""),
        f"{times['p95']:.1f}",
        f"{row['floor_ms']:.1f}",
        f"{row['floor_ratio']:.3f}",
        f"{row['bytes_per_value']:.3f}" if "bytes_per_value" in row else "",
        " ".join(f"{ms:.1f}" for ms in row.get("stage_ms", ())),
    )


def _table(rows: Sequence[Row], titles: Sequence[str], cells_of: Callable[[Row], Sequence[str]]) -> str:
    """With columns for rungs where there are several."""
    ladder = len({row["rung"] for row in rows}) > 1
    shown = ("net", *(("rung", "x rung below") if ladder else ()), *titles)
    lines = ["| " + " | ".join(shown) + " |", "|---|" + "---:|" * (len(shown) - 1)]
    for row in rows:
        ratio = f"{row['to_rung_below']:.3f}" if "to_rung_below" in row else ""
        cells = (name_of(row), *((row["rung"], ratio) if ladder else ()), *cells_of(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def prefill_table(rows: Sequence[Row]) -> str:
    """The suite ``prefill`` in Markdown."""
    titles = ("prompt", "chunk", "first token s", "floor s", "x floor", "cold s", "link Mbps", "driver up bytes")
    return _table(rows, titles, _prefill_cells)


def _prefill_cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row['prompt_tokens']}",
        f"{row['chunk_tokens']}",
        f"{row['ttft_s']:.3f}" + (f" ({row['ttft_s_min']:.2f}-{row['ttft_s_max']:.2f})" if "ttft_s_min" in row else ""),
        f"{row['floor_s']:.3f}",
        f"{row['floor_ratio']:.3f}",
        f"{row['cold_ttft_s']:.2f}" if "cold_ttft_s" in row else "",
        f"{row['link_mbps']:.0f}" if row.get("link_mbps") else "",
        f"{row['driver_up_bytes']}" if "driver_up_bytes" in row else "",
    )


def many_table(rows: Sequence[Row]) -> str:
    """The suite ``many`` in Markdown."""
    titles = ("sessions", "tokens/s of all", "of one alone", "ms/token p50", "p95", "x floor of one")
    return _table(rows, titles, _many_cells)


def _many_cells(row: Row) -> tuple[str, ...]:
    times = row["inter_token_ms"]
    figures = (row["total_tokens_per_s"], row["single_tokens_per_s"], times["p50"], times["p95"])
    return (f"{row['sessions']}", *(f"{figure:.1f}" for figure in figures), f"{row['floor_ratio']:.3f}")


def head_of_line_table(rows: Sequence[Row]) -> str:
    """The case ``head-of-line`` of the suite ``many`` in Markdown."""
    titles = ("ms/token alone p50", "p95", "beside the prompt p50", "p95", "p95 x", "tokens", "the other's first token s")
    return _table(rows, titles, _head_of_line_cells)


def _head_of_line_cells(row: Row) -> tuple[str, ...]:
    times = [row[key][of] for key in ("alone_ms", "inter_token_ms") for of in ("p50", "p95")]
    return (*(f"{time:.1f}" for time in times), f"{row['p95_ratio']:.3f}", f"{row['tokens']}", f"{row['other_ttft_s']:.2f}")


def head_of_line_plot(rows: Sequence[Row], title: str) -> str:
    """The 95th percentile of the time between tokens by network as SVG, beside a prompt and alone."""
    reached = [float(row["inter_token_ms"]["p95"]) for row in rows]
    alone = [float(row["alone_ms"]["p95"]) for row in rows]
    words = "ms between tokens, 95th percentile, beside another's long prompt (bars); alone (red)"
    return bars([name_of(row) for row in rows], reached, alone, (title, words))


def decode_plot(rows: Sequence[Row], title: str) -> str:
    """Tokens per second by network as SVG, and what the floor would allow."""
    reached = [float(row["tokens_per_s"]) for row in rows]
    limits = [1e3 / float(row["floor_ms"]) if row["floor_ms"] else rate for row, rate in zip(rows, reached, strict=True)]
    return bars([name_of(row) for row in rows], reached, limits, (title, "tokens/s (bars); what the floor allows (red)"))


def prefill_plot(rows: Sequence[Row], title: str) -> str:
    """Seconds to the first token by network as SVG, and the floor."""
    reached = [float(row["ttft_s"]) for row in rows]
    limits = [float(row["floor_s"]) for row in rows]
    return bars([name_of(row) for row in rows], reached, limits, (title, "seconds to the first token (bars); the floor (red)"))


def many_plot(rows: Sequence[Row], title: str) -> str:
    """Tokens per second of all sessions by network as SVG, and of one alone."""
    reached = [float(row["total_tokens_per_s"]) for row in rows]
    alone = [float(row["single_tokens_per_s"]) for row in rows]
    return bars([name_of(row) for row in rows], reached, alone, (title, "tokens/s of all sessions (bars); of one alone (red)"))


def bars(names: Sequence[str], reached: Sequence[float], limits: Sequence[float], titles: tuple[str, str]) -> str:
    """A bar for each name, with a line across it where its limit is."""
    most, step = _scale(max([*reached, *limits]))
    width = max(LEFT + RIGHT + len(names) * (BAR + GAP), LEFT + 8 * len(titles[0]), LEFT + 7 * len(titles[1]))
    total = TOP + HEIGHT + BOTTOM + 14 * max(name.count("+") for name in names)

    def y(rate: float) -> float:
        return TOP + HEIGHT * (1 - rate / most)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{total}" fill="{PAPER}"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(titles[0])}</text>',
        f'<text x="{LEFT}" y="44">{escape(titles[1])}</text>',
    ]
    for tick in range(round(most / step) + 1):
        at = y(tick * step)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick * step:g}</text>')
    for index, (name, rate, limit) in enumerate(zip(names, reached, limits, strict=True)):
        x = LEFT + GAP / 2 + index * (BAR + GAP)
        middle = x + BAR / 2
        parts.append(f'<rect x="{x:.1f}" y="{y(rate):.1f}" width="{BAR}" height="{HEIGHT * rate / most:.1f}" fill="{FILL}"/>')
        at = y(limit)
        parts.append(
            f'<line x1="{x - 6:.1f}" x2="{x + BAR + 6:.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="{FLOOR}" stroke-width="2"/>'
        )
        top = at if y(rate) <= at < y(rate) + 24 else y(rate)
        # In the bar where there is room: above the line it would seem to be the line's.
        where, ink = (top + 17, PAPER) if top + 24 < TOP + HEIGHT else (min(y(rate), at) - 6, INK)
        parts.append(
            f'<text x="{middle:.1f}" y="{where:.1f}" text-anchor="middle" font-weight="600" fill="{ink}">{rate:.3g}</text>'
        )
        under = TOP + HEIGHT
        for line, word in enumerate(name.replace("+", " +").split()):
            parts.append(f'<text x="{middle:.1f}" y="{under + 18 + 14 * line}" text-anchor="middle">{escape(word)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _scale(most: float) -> tuple[float, float]:
    """A round number at or above ``most``, and the distance of some five ticks below it."""
    power = 1.0
    while power * 10 <= most:
        power *= 10
    while power > most > 0:
        power /= 10
    step = next(factor * power / 5 for factor in (1, 1.5, 2, 2.5, 4, 5, 7.5, 10) if factor * power >= most)
    return step * 5, step
