#!/usr/bin/env python3
"""Draws the dashboard of docs/grafana.json from a real run: docs/dashboard.svg.

    cargo build --release -p tenorite-example --example http
    tenorite-example/dashboard.py [--seconds 60] [--into docs/dashboard.svg]

Starts the example `http` with a storage that takes a millisecond, sends requests to it
(few; then many more than it can serve; then few again), reads /metrics each second, and evaluates
the dashboard's own queries on what it has read. Nothing is drawn that was not read.
"""

import argparse
import asyncio
import collections
import json
import math
import random
import re
import subprocess
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "target/release/examples/http"
ADDRESS = ("127.0.0.1", 18080)
WINDOW = 5  # the seconds of a rate

# How many clients there are from this share of the run on.
CLIENTS = [(0.0, 1), (0.2, 8), (0.45, 96), (0.7, 4)]


async def request(streams, method, path, body=b""):
    """Sends a request over a connection that is kept, and returns the response's body."""
    reader, writer = streams
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: tenorite\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return await reader.readexactly(int(length.group(1))) if length else b""


async def client(number, until):
    """Reads keys and writes some, and visits a session now and then."""
    streams = await asyncio.open_connection(*ADDRESS)
    chance = random.Random(number)
    while time.monotonic() < until:
        key = f"/keys/{chance.randrange(64)}"
        match chance.randrange(20):
            case 0:
                await request(streams, "DELETE", key)
            case 1 | 2 | 3:
                await request(streams, "PUT", key, b"weeee")
            case 4:
                await request(streams, "POST", f"/sessions/{chance.randrange(40)}")
            case _:
                await request(streams, "GET", key)
        await asyncio.sleep(0.001)
    streams[1].close()


async def run(seconds):
    """Returns what was read, with the seconds since the start."""
    server = subprocess.Popen(
        [SERVER, "--listen", "%s:%d" % ADDRESS, "--delay-ms", "1", "--backlog", "64", "--timeout-ms", "120", "--idle-ms", "2500"],
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                scraper = await asyncio.open_connection(*ADDRESS)
                break
            except OSError:
                await asyncio.sleep(0.05)
        began = time.monotonic()
        starts = [share * seconds for share, _ in CLIENTS] + [seconds]
        tasks = [
            asyncio.create_task(later(began + starts[phase], number, began + starts[phase + 1]))
            for phase, (_, clients) in enumerate(CLIENTS)
            for number in range(clients)
        ]
        read = []
        for second in range(seconds + 1):
            await asyncio.sleep(max(0, began + second - time.monotonic()))
            text = (await request(scraper, "GET", "/metrics")).decode()
            read.append((time.monotonic() - began, parse(text)))
        await asyncio.gather(*tasks)
        return read
    finally:
        server.terminate()
        server.wait()


async def later(start, number, until):
    await asyncio.sleep(max(0, start - time.monotonic()))
    await client(number, until)


def parse(text):
    """Returns the samples of Prometheus' text format by metric, as pairs of labels and value."""
    samples = collections.defaultdict(list)
    for line in text.splitlines():
        if found := re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            samples[found[1]].append((labels, float(found[3])))
    return samples


def evaluate(query, read, at):
    """Evaluates a query of the dashboard, at this place in what was read: labels and values."""
    query = query.replace('service=~"$service",name=~"$name"', "").replace("[$__rate_interval]", "[]")
    if found := re.fullmatch(r"histogram_quantile\(([\d.]+), (.*)\)", query):
        return quantile(float(found[1]), evaluate(found[2], read, at))
    if " / " in query:
        above, below = (evaluate(part, read, at) for part in query.split(" / "))
        return {labels: above[labels] / value for labels, value in below.items() if value and labels in above}
    found = re.fullmatch(r"(?:(\d+) \* )?sum by \((.*?)\) \((rate\()?(\w+)\{,?(.*?)\}(?:\[\]\))?\)", query)
    assert found, f"this query is not understood: {query}"
    factor, by, is_rate, metric, condition = found.groups()
    unwanted = re.fullmatch(r'(\w+)!="(.*)"', condition)

    def total(place):
        sums = collections.Counter()
        for labels, value in read[place][1].get(metric, []):
            if not unwanted or labels.get(unwanted[1]) != unwanted[2]:
                sums[tuple((name, labels.get(name, "")) for name in by.split(", "))] += value
        return sums

    now = total(at)
    if is_rate:
        since = max(0, at - WINDOW)
        took = read[at][0] - read[since][0]
        before = total(since)
        now = {labels: (value - before[labels]) / took for labels, value in now.items()} if took else {}
    return {labels: value * float(factor or 1) for labels, value in now.items()}


def quantile(share, buckets):
    """Interpolates in the bucket that the quantile falls into, as Prometheus does."""
    by_labels = collections.defaultdict(list)
    for labels, value in buckets.items():
        kept = tuple(label for label in labels if label[0] != "le")
        by_labels[kept].append((float(dict(labels)["le"].replace("+Inf", "inf")), value))
    result = {}
    for labels, counts in by_labels.items():
        counts.sort()
        rank, below, start = share * counts[-1][1], 0.0, 0.0
        if not rank:
            continue
        for end, count in counts:
            if count >= rank:
                inside = (rank - below) / (count - below)
                result[labels] = start if math.isinf(end) else start + (end - start) * inside
                break
            below, start = count, end
    return result


def series(panel, read):
    """Returns the lines of a panel by their names."""
    lines = collections.defaultdict(list)
    for target in panel["targets"]:
        for at, (second, _) in enumerate(read):
            for labels, value in evaluate(target["expr"], read, at).items():
                name = target["legendFormat"]
                for label, text in labels:
                    name = name.replace("{{%s}}" % label, text)
                lines[" ".join(name.split())].append((second, value))
    return {name: points for name, points in sorted(lines.items()) if any(value for _, value in points)}


WIDTH, EDGE, GAP, LEFT, PLOT, LEGEND = 960, 18, 30, 52, 130, 15
COLORS = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf8700", "#cf222e", "#1b7c83", "#6e7781"]
STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 19px; font-weight: 600 }
  .heading { font-size: 13px; font-weight: 600 }
  .soft { fill: #59636e }
  .tick { fill: #59636e; font-size: 11px; text-anchor: end }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .grid { stroke: #d1d9e0 }
  .line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .soft, .tick { fill: #9198a1 }
    .page { fill: #0d1117; stroke: #3d444d }
    .grid { stroke: #3d444d }
    .line, .key { filter: brightness(1.35) }
  }
"""


def shown(value, unit):
    if unit == "s":
        for factor, name in [(1, "s"), (1e3, "ms"), (1e6, "µs")]:
            if value * factor >= 1 or name == "µs":
                return f"{value * factor:.3g} {name}" if value else "0"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def step(most):
    """A round step of which the axis has three or so."""
    power = 10 ** math.floor(math.log10(most / 3))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= most / 3)


def draw(panels, read, title, notes):
    parts, seconds = [], read[-1][0]

    def text(kind, x, y, words):
        parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    text("title", EDGE, 36, title)
    text("soft", EDGE, 57, notes)
    y, column = 74, (WIDTH - 2 * EDGE - GAP) / 2
    for pair in (panels[at : at + 2] for at in range(0, len(panels), 2)):
        lowest = y
        for place, panel in enumerate(pair):
            left, lines = EDGE + place * (column + GAP), series(panel, read)
            unit = panel["fieldConfig"]["defaults"].get("unit")
            text("heading", left, y + 14, panel["title"])
            if not lines:
                text("soft", left + LEFT, y + 40, "none in this run")
                continue
            most = max(value for points in lines.values() for _, value in points)
            size = step(most)
            top, full = y + 26, size * math.ceil(most / size)
            for tick in range(round(full / size) + 1):
                at = top + PLOT - tick * size / full * PLOT
                parts.append(f'<path class="grid" d="M{left + LEFT:g} {at:.1f}H{left + column:g}"/>')
                text("tick", left + LEFT - 6, at + 4, shown(tick * size, unit))
            for number, (name, points) in enumerate(lines.items()):
                color = COLORS[number % len(COLORS)]
                across = column - LEFT
                path = " ".join(
                    f"{left + LEFT + second / seconds * across:.1f},{top + PLOT - value / full * PLOT:.1f}"
                    for second, value in points
                )
                dashes = ' stroke-dasharray="5 3"' if name.endswith(("p50", "backlog")) else ""
                parts.append(f'<polyline class="line" stroke="{color}"{dashes} points="{path}"/>')
                key_x, key_y = left + LEFT + number % 2 * across / 2, top + PLOT + 18 + number // 2 * LEGEND
                parts.append(f'<path class="key" stroke="{color}" stroke-width="3"{dashes} d="M{key_x:g} {key_y - 4:g}h16"/>')
                text("soft", key_x + 22, key_y, name)
            lowest = max(lowest, top + PLOT + 18 + (len(lines) - 1) // 2 * LEGEND)
        y = max(lowest, y + 40) + 24
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" width="{WIDTH}" height="{y:g}" '
        'role="img" aria-labelledby="title notes">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="notes">{escape(notes)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{y - 1:g}" rx="6"/>',
        *parts,
        "</svg>\n",
    ])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--into", type=Path, default=ROOT / "docs/dashboard.svg")
    options = options.parse_args()
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    read = asyncio.run(run(options.seconds))
    counts = ", then ".join(f"{clients}" for _, clients in CLIENTS)
    notes = f"The example http, {options.seconds} seconds: {counts} clients. A storage of 1 ms, a limit of 120 ms, a backlog of 64."
    panels = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    options.into.write_text(draw(panels, read, dashboard["title"], notes))
    print(f"wrote {options.into}")


main()
