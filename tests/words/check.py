#!/usr/bin/env python3
"""Counts what can be counted about the words of comments and pages: check.py [--report] [--list] PATH...

- At least 85 % of the documented functions open with a verb in the third person ("Returns"). tokio's
  `sync` stands at about that, crossbeam-channel above it.
- No comment speaks of threads, tasks and calls as of persons.
- No comment, and no line of prose in a Markdown page, is longer than 100 columns.

With --report only the figures are printed, for comparison with other crates. --list names the functions
whose documentation opens otherwise.
"""

import pathlib
import re
import sys

LEAST = 0.85
COLUMNS = 100
PERSONS = re.compile(
    r"\b(he|him|his|himself|she|who|whom|whoever|nobody|somebody|anybody|everybody)\b", re.IGNORECASE
)
FUNCTION = re.compile(
    r"^\s*(pub(\([^)]*\))? )?(default )?(const )?(async )?(unsafe )?(extern \"[^\"]*\" )?fn \w+"
)
# Words that look like a verb in the third person and are none.
NO_VERBS = {"This", "Its", "As", "Is", "Has", "Was", "Others", "Less", "Always", "Cases"}


def opens_with_verb(line):
    # The transitions of the cell's state are numbered.
    line = re.sub(r"^T\d+[^.]*\. ", "", line)
    word = re.match(r"([A-Za-z]+)", line)
    return bool(word) and bool(re.fullmatch(r"[A-Z][a-z]+s", word.group(1))) and word.group(1) not in NO_VERBS


def read(path):
    """Yields (line number, kind, text): the docs of functions, and all comments."""
    docs, in_code = [], False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        stripped = line.strip()
        comment = re.match(r"//[/!]?\s?(.*)", stripped)
        if comment:
            # Code in documentation is formatted as code is, and so may be longer.
            in_fence = in_code or comment.group(1).startswith("```")
            if not in_fence and len(line) > COLUMNS and "http" not in line and "|" not in comment.group(1):
                yield number, "long", line
            if comment.group(1).startswith("```"):
                in_code = not in_code
            if not in_code:
                yield number, "comment", comment.group(1)
            if stripped.startswith("///") and not in_code:
                docs.append(comment.group(1))
            continue
        in_code = False
        if FUNCTION.match(line):
            if docs:
                yield number, "function", docs[0]
            docs = []
        elif not stripped.startswith("#[") and not stripped.endswith((")]", ",")):
            docs = []


def long_prose(path):
    """Yields the numbers of lines that could be wrapped: not of code, of tables, or of one long link."""
    in_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        in_code ^= line.startswith("```")
        if len(line) > COLUMNS and not in_code and not line.startswith(("|", "!", "[")):
            yield number


def main():
    report = "--report" in sys.argv
    folders = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    functions, verbs, problems = 0, 0, []
    for folder in map(pathlib.Path, folders):
        if folder.suffix == ".md":
            problems += [f"{folder}:{number}: longer than {COLUMNS} columns" for number in long_prose(folder)]
            continue
        for path in sorted(folder.rglob("*.rs")):
            for number, kind, text in read(path):
                if kind == "function":
                    functions += 1
                    verbs += opens_with_verb(text)
                    if "--list" in sys.argv and not opens_with_verb(text):
                        print(f"{path}:{number}: no verb: {text}")
                elif kind == "long":
                    problems.append(f"{path}:{number}: longer than {COLUMNS} columns")
                elif person := PERSONS.search(text):
                    problems.append(f"{path}:{number}: `{person.group()}`: {text.strip()}")
    share = verbs / max(functions, 1)
    print(f"{functions} documented functions, {share:.0%} open with a verb; {len(problems)} other findings")
    if report:
        return
    for problem in problems:
        print(problem)
    if share < LEAST or problems:
        sys.exit(1)


main()
