#!/usr/bin/env python3
"""Prints the public API of a crate from the pages that rustdoc has rendered: list.py target/doc/CRATE.

Each item with its declaration, then its methods, its required and provided items, and the traits that it
implements. Auto traits and blanket implementations are left out.
"""

import html
import pathlib
import re
import sys


def text(fragment):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", fragment)).split())


def section(page, title):
    """Returns the part of the page below a heading, up to the next of its rank."""
    found = re.search(rf'<h2 id="{title}"', page)
    if not found:
        return ""
    rest = page[found.end() :]
    end = re.search(r'<h2 id="', rest)
    return rest[: end.start()] if end else rest


def headers(part, tag):
    # What belongs to a section is in an <h4>, and the `impl` around it in an <h3>.
    return [text(found) for found in re.findall(rf'<{tag} class="code-header">(.*?)</{tag}>', part, re.S)]


def describe(path):
    page = path.read_text()
    declared = re.search(r'<pre class="rust item-decl"><code>(.*?)</code></pre>', page, re.S)
    lines = [text(declared.group(1)) if declared else "(no declaration)"]
    for title in ["required-associated-types", "required-methods", "provided-methods", "implementations"]:
        part = section(page, title)
        lines += headers(part, "h4") if title == "implementations" else headers(part, "h4")
    lines += [f"impl: {line}" for line in headers(section(page, "trait-implementations"), "h3")]
    return lines


def main():
    crate = pathlib.Path(sys.argv[1])
    items = re.findall(r'<li><a href="([^"]+)">', (crate / "all.html").read_text())
    for item in sorted(items):
        if item.startswith("guide/"):
            continue
        first, *rest = describe(crate / item)
        kind, name = re.match(r"(?:(.*)/)?(\w+\.\w+)\.html", item).groups() if "/" in item else ("", item[:-5])
        print(f"## {kind + '/' if kind else ''}{name}")
        print(first)
        for line in rest:
            print("    " + line)
        print()


main()
