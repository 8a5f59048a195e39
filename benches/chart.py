#!/usr/bin/env python3
"""Draws what the benchmarks measured: bench.svg for pages, and bench-narrow.svg for phones.

    benches/chart.py [--from RESULTS.json] [--into FOLDER]

The folder is docs, and the figures are those of docs/bench.json, unless others are named. What is
shown of them is kept beside the pictures, as bench.json: a reader and CI draw the same again.
"""

import argparse
import json
import math
import textwrap
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
# The workloads that say most, in the words of the README's table.
PANELS = {
    "one task in a loop": "One task in a loop",
    "64 tasks": "64 tasks, nine reads to a write",
    "64 in flight from one task": "64 calls in flight from one task",
    "a caller on another thread": "A caller on another thread",
}
OURS = "tenorite"
TITLE = "What a call costs, in nanoseconds"
NOTES = "Elapsed time divided by calls, median of the rounds. Lower is better. The scale is logarithmic."

EDGE, GAP = 18, 26
PANEL, NAMES, FIGURE = 384, 122, 78
ROW, BAR, HEADING, AXIS = 23, 15, 34, 30

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 20px; font-weight: 600 }
  .heading { font-size: 15px; font-weight: 600 }
  .soft { fill: #59636e }
  .tick { fill: #59636e; font-size: 11px; text-anchor: middle }
  .figure { font-variant-numeric: tabular-nums; paint-order: stroke; stroke: #ffffff; stroke-width: 4px }
  .ours { fill: #0969da; font-weight: 600 }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .grid { stroke: #d1d9e0 }
  .bar { fill: #afb8c1 }
  .bar.ours { fill: #0969da }
  .bar.bound { fill: #d4d9de }
  .bar.ours.bound { fill: #78aeea }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .soft, .tick { fill: #9198a1 }
    .ours, .bar.ours { fill: #4493f8 }
    .figure { stroke: #0d1117 }
    .page { fill: #0d1117; stroke: #3d444d }
    .grid { stroke: #3d444d }
    .bar { fill: #656c76 }
    .bar.bound { fill: #3a4048 }
    .bar.ours.bound { fill: #2a5b99 }
  }
"""


def three_digits(figure):
    """Runs differ by more than a fourth digit says."""
    unit = 10 ** max(0, math.floor(math.log10(figure)) - 2)
    return f"{round(figure / unit) * unit:,}"


def beginning(least):
    """Bars on a logarithmic scale need a beginning. The shortest is to be seen, and not to look long."""
    power = 10 ** math.floor(math.log10(least / 2))
    return max(step * power for step in (1, 2, 5) if step * power <= least / 2)


def shown(results):
    """Of each workload with a panel the contestants with a bar, the cheapest first."""
    for workload in PANELS:
        # tenorite by hand, and its earlier versions, are measured for those who work on it.
        rows = [
            row
            for row in results
            if row["workload"] == workload and not row["contestant"].startswith(f"{OURS} ")
        ]
        yield sorted(rows, key=lambda row: row["median_ns"])


def draw(panels, columns):
    medians = [row["median_ns"] for rows in panels for row in rows]
    first, last = beginning(min(medians)), max(medians)
    ticks = [first, *(10**power for power in range(9) if first < 10**power <= last)]
    width = 2 * EDGE + columns * PANEL + (columns - 1) * GAP
    parts = []

    def text(kind, x, y, words):
        parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def along(figure):
        return NAMES + math.log(figure / first) / math.log(last / first) * (PANEL - NAMES - FIGURE)

    text("title", EDGE, 37, TITLE)
    y = 40
    for line in textwrap.wrap(NOTES, int(width / 7.4)):
        y += 21
        text("soft", EDGE, y, line)
    y += 12
    for place in range(0, len(panels), columns):
        abreast = panels[place : place + columns]
        height = max(map(len, abreast)) * ROW
        for column, rows in enumerate(abreast):
            left, top = EDGE + column * (PANEL + GAP), y + HEADING
            text("heading", left, top - 9, PANELS[rows[0]["workload"]])
            for tick in ticks:
                x = round(left + along(tick), 1)
                parts.append(f'<path class="grid" d="M{x:g} {top}v{height + 4}"/>')
                text("tick", x, top + height + 18, f"{tick:,}")
            for row in rows:
                name, end = row["contestant"], round(along(row["median_ns"]), 1)
                who = " ours" if name == OURS else ""
                # Of these figures no more is known than what they are below.
                bound, under = (" bound", "under ") if row.get("under") else ("", "")
                text("name" + who, left, top + 16, name)
                parts.append(
                    f'<rect class="bar{who}{bound}" x="{left + NAMES}" y="{top + (ROW - BAR) // 2}" '
                    f'width="{end - NAMES:.1f}" height="{BAR}" rx="2"/>'
                )
                text("figure" + who, left + end + 7, top + 16, f"{under}{three_digits(row['median_ns'])} ns")
                top += ROW
        y += HEADING + height + AXIS
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        'role="img" aria-labelledby="title notes">',
        f'<title id="title">{TITLE}</title>',
        f'<desc id="notes">{NOTES}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x=".5" y=".5" width="{width - 1}" height="{y - 1}" rx="6"/>',
        *parts,
        "</svg>\n",
    ])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--from", dest="results", type=Path, default=DOCS / "bench.json")
    options.add_argument("--into", dest="folder", type=Path, default=DOCS)
    results, folder = vars(options.parse_args()).values()
    panels = list(filter(None, shown(json.loads(results.read_text(encoding="utf-8")))))
    if not panels:
        options.error(f"{results} has none of the workloads that are shown")
    kept = ",\n".join(json.dumps(row) for rows in panels for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in [
        ("bench.json", f"[\n{kept}\n]\n"),
        ("bench.svg", draw(panels, columns=2)),
        ("bench-narrow.svg", draw(panels, columns=1)),
    ]:
        (folder / name).write_text(content, encoding="utf-8")


main()
