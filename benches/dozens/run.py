#!/usr/bin/env python3
"""What many services cost to build: forty services of three methods, and one of two hundred.

Generates the same program with tenorite and by hand (mpsc, oneshot, an enum, a caller), each also
with one service, and compares: lines of LLVM IR before optimization, the size of a stripped release
binary, a cold debug build of the program (its dependencies are built), and a debug build after an
edit in one handler.

    benches/dozens/run.py [--services 40] [--rounds 3]
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "target/dozens"

METHODS = [
    ("get", "&self", "key: &str", "Option<String>", "self.map.get(key).cloned()", ["key"]),
    ("set", "&mut self", "key: String, value: String", "Option<String>", "self.map.insert(key, value)", ["key", "value"]),
    ("slow", "&mut self", "key: String", "Result<usize, std::io::Error>", "tokio::task::yield_now().await; Ok(self.map.len() + key.len())", ["key"]),
]


def methods(count: int):
    """So many methods, of the three kinds in turn."""
    for number in range(count):
        name, me, args, reply, body, names = METHODS[number % 3]
        suffix = "" if number < 3 else str(number)
        yield name + suffix, me, args, reply, body, names, name == "slow"


def variant(name: str) -> str:
    return name[0].upper() + name[1:]


def with_tenorite(number: int, count: int) -> str:
    lines = [f"pub struct Store{number} {{ map: HashMap<String, String> }}", "#[tenorite::service]", f"impl Store{number} {{"]
    for name, me, args, reply, body, _, is_async in methods(count):
        keyword = "async fn" if is_async else "fn"
        lines.append(f"    pub {keyword} {name}({me}, {args}) -> {reply} {{ {body} }}")
    lines += ["}", f"pub async fn use{number}() {{"]
    lines.append(f"    let store = Store{number}Service.start(32, Store{number} {{ map: HashMap::new() }});")
    for name, _, _, _, _, names, _ in methods(count):
        values = ", ".join('"x"' for _ in names)
        lines.append(f'    println!("{{:?}}", store.{name}({values}).await);')
    return "\n".join(lines + ["}"])


def by_hand(number: int, count: int) -> str:
    name = f"Store{number}"
    lines = [f"pub struct {name} {{ map: HashMap<String, String> }}", f"pub enum {name}Request {{"]
    for method, _, args, reply, _, _, _ in methods(count):
        fields = args.replace("&str", "String")
        lines.append(f"    {variant(method)} {{ {fields}, reply: oneshot::Sender<{reply}> }},")
    lines += ["}", "#[derive(Clone)]", f"pub struct {name}Caller(mpsc::Sender<{name}Request>);", f"impl {name}Caller {{"]
    for method, _, args, reply, _, names, _ in methods(count):
        taken = re.sub(r"(\w+): (&str|String)", r"\1: impl Into<String>", args)
        fields = ", ".join(f"{field}: {field}.into()" for field in names)
        lines.append(
            f"    pub async fn {method}(&self, {taken}) -> Result<{reply}, Gone> {{\n"
            f"        let (reply, answer) = oneshot::channel();\n"
            f"        self.0.send({name}Request::{variant(method)} {{ {fields}, reply }}).await.map_err(|_| Gone)?;\n"
            f"        answer.await.map_err(|_| Gone)\n    }}"
        )
    lines += ["}", f"impl {name} {{"]
    for method, me, args, reply, body, _, is_async in methods(count):
        keyword = "async fn" if is_async else "fn"
        lines.append(f"    {keyword} {method}({me}, {args}) -> {reply} {{ {body} }}")
    lines += ["    async fn run(mut self, mut requests: mpsc::Receiver<" + f"{name}Request>) {{", "        while let Some(request) = requests.recv().await {", "            match request {"]
    for method, _, args, _, _, names, is_async in methods(count):
        passed = ", ".join("&" + field if f"{field}: &str" in args else field for field in names)
        awaited = ".await" if is_async else ""
        lines.append(
            f"                {name}Request::{variant(method)} {{ {', '.join(names)}, reply }} => {{ let _ = reply.send(self.{method}({passed}){awaited}); }}"
        )
    lines += ["            }", "        }", "    }", "}", f"pub async fn use{number}() {{"]
    lines.append(f"    let (sender, receiver) = mpsc::channel(32);\n    tokio::spawn(Store{number} {{ map: HashMap::new() }}.run(receiver));\n    let store = {name}Caller(sender);")
    for method, _, _, _, _, names, _ in methods(count):
        values = ", ".join('"x"' for _ in names)
        lines.append(f'    println!("{{:?}}", store.{method}({values}).await);')
    return "\n".join(lines + ["}"])


KINDS = {"tenorite": with_tenorite, "by hand": by_hand}
HEADS = {
    "tenorite": "use std::collections::HashMap;\nuse tenorite::prelude::*;",
    "by hand": "use std::collections::HashMap;\nuse tokio::sync::{mpsc, oneshot};\n#[derive(Debug)]\npub struct Gone;",
}


def generate(kind: str, services: int, count: int) -> Path:
    folder = WORK / f"{kind.replace(' ', '-')}-{services}-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "src").mkdir(parents=True)
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "dozens"\nversion = "0.0.0"\nedition = "2024"\n\n[workspace]\n\n[dependencies]\n'
        f'tenorite = {{ path = "{ROOT / "tenorite"}" }}\n'
        'tokio = { version = "1", features = ["macros", "rt-multi-thread", "sync", "time"] }\n\n'
        "[profile.release]\nstrip = true\n"
    )
    shutil.copy(ROOT / "Cargo.lock", folder / "Cargo.lock")
    body = "\n".join(KINDS[kind](number, count) for number in range(services))
    uses = "\n".join(f"    use{number}().await;" for number in range(services))
    (folder / "src/main.rs").write_text(f"#![allow(dead_code)]\n{HEADS[kind]}\n{body}\n#[tokio::main]\nasync fn main() {{\n{uses}\n}}\n")
    return folder


def cargo(folder: Path, *args: str) -> float:
    environment = {**os.environ, "CARGO_TARGET_DIR": str(WORK / "target"), "CARGO_INCREMENTAL": "1"}
    began = time.monotonic()
    subprocess.run(["cargo", *args, "--quiet", "--offline"], cwd=folder, env=environment, check=True)
    return time.monotonic() - began


def lines_of_ir(folder: Path) -> int:
    for old in (WORK / "target/debug/deps").glob("dozens-*.ll"):
        old.unlink()
    os.utime(folder / "src/main.rs")
    environment = ["rustc", "--", "--emit=llvm-ir", "-Cno-prepopulate-passes", "-Ccodegen-units=1", "-Cdebuginfo=0"]
    environment.insert(1, "--quiet")
    subprocess.run(
        ["cargo", *environment],
        cwd=folder,
        env={**os.environ, "CARGO_TARGET_DIR": str(WORK / "target"), "CARGO_INCREMENTAL": "0"},
        check=True,
    )
    found = list((WORK / "target/debug/deps").glob("dozens-*.ll"))
    return sum(1 for path in found for line in path.open() if line.startswith("  "))


def measure(kind: str, services: int, count: int, rounds: int) -> dict[str, float]:
    folder = generate(kind, services, count)
    cargo(folder, "build")
    cargo(folder, "build", "--release")
    source = folder / "src/main.rs"
    figures = {"size (KiB)": (WORK / "target/release/dozens").stat().st_size / 1024, "IR (lines)": lines_of_ir(folder)}
    cold, edited = [], []
    for round_ in range(rounds):
        shutil.rmtree(WORK / "target/debug/incremental", ignore_errors=True)
        os.utime(source)
        cold.append(cargo(folder, "build"))
        source.write_text(source.read_text().replace("self.map.len() + ", f"self.map.len() + {round_} + ", 1))
        edited.append(cargo(folder, "build"))
    figures["cold (s)"] = statistics.median(cold)
    figures["edit (s)"] = statistics.median(edited)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| program | | tenorite | by hand | ratio |\n|---|---|---:|---:|---:|")
    for services, count in [(options.services, 3), (1, 200)]:
        ours, theirs = (measure(kind, services, count, options.rounds) for kind in KINDS)
        for name, value in ours.items():
            program = f"{services} services of {count} methods" if services > 1 else f"{count} methods in one"
            print(f"| {program} | {name} | {value:,.1f} | {theirs[name]:,.1f} | {value / theirs[name]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
