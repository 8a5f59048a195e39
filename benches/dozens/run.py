#!/usr/bin/env python3
"""What many services cost to build: forty services of three methods, and one of two hundred.

Generates the same program with tenorite, by hand (mpsc, oneshot, an enum, a caller), with kameo and
with ractor, and compares: lines of LLVM IR before optimization, the size of a stripped release
binary, a cold debug build of the program (its dependencies are built), and a debug build after an
edit in one handler. The versions are those of benches/Cargo.lock.

    benches/dozens/run.py [--services 40] [--rounds 5] [--among tenorite,kameo]
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "target/dozens"

@dataclass
class Method:
    """A method of the store, and what each program writes of it."""

    name: str
    me: str
    args: str
    reply: str
    body: str

    @property
    def names(self) -> list[str]:
        """Its arguments' names."""
        return re.findall(r"(\w+):", self.args)

    @property
    def variant(self) -> str:
        return self.name[0].upper() + self.name[1:]

    @property
    def awaited(self) -> str:
        return ".await" if "await" in self.body else ""

    @property
    def definition(self) -> str:
        keyword = "async fn" if self.awaited else "fn"
        return f"{keyword} {self.name}({self.me}, {self.args}) -> {self.reply} {{ {self.body} }}"

    @property
    def owned(self) -> str:
        """Its arguments as the fields of a message."""
        return self.args.replace("&str", "String")

    @property
    def taken(self) -> str:
        """Its arguments as a caller takes them."""
        return re.sub(r"(\w+): (&str|String)", r"\1: impl Into<String>", self.args)

    @property
    def converted(self) -> str:
        """The fields of a message, of what a caller has taken."""
        return ", ".join(f"{name}: {name}.into()" for name in self.names)

    def passed(self, of: str = "") -> str:
        """The arguments of a call of it, of owned ones."""
        return ", ".join(("&" if f"{name}: &str" in self.args else "") + of + name for name in self.names)


KINDS_OF_METHODS = [
    Method("get", "&self", "key: &str", "Option<String>", "self.map.get(key).cloned()"),
    Method("set", "&mut self", "key: String, value: String", "Option<String>", "self.map.insert(key, value)"),
    Method("slow", "&mut self", "key: String", "Result<usize, std::io::Error>", "tokio::task::yield_now().await; Ok(self.map.len() + key.len())"),
]


def methods(count: int) -> list[Method]:
    """So many methods, of the three kinds in turn."""
    kinds = [(number, KINDS_OF_METHODS[number % 3]) for number in range(count)]
    return [replace(kind, name=kind.name + (str(number) if number >= 3 else "")) for number, kind in kinds]


def use(number: int, count: int, start: str, ended: str = "") -> list[str]:
    """A function that starts the store, and calls each method once."""
    lines = [f"pub async fn use{number}() {{", f"    {start}"]
    for method in methods(count):
        values = ", ".join('"x"' for _ in method.names)
        lines.append(f'    println!("{{:?}}", store.{method.name}({values}).await{ended});')
    return lines + ["}"]


def with_tenorite(number: int, count: int) -> str:
    lines = [f"pub struct Store{number} {{ map: HashMap<String, String> }}", "#[tenorite::service]", f"impl Store{number} {{"]
    lines += [f"    pub {method.definition}" for method in methods(count)]
    start = f"let store = Store{number}Service.start(32, Store{number} {{ map: HashMap::new() }});"
    return "\n".join([*lines, "}", *use(number, count, start)])


def by_hand(number: int, count: int) -> str:
    name = f"Store{number}"
    lines = [f"pub struct {name} {{ map: HashMap<String, String> }}", f"pub enum {name}Request {{"]
    for method in methods(count):
        lines.append(f"    {method.variant} {{ {method.owned}, reply: oneshot::Sender<{method.reply}> }},")
    lines += ["}", "#[derive(Clone)]", f"pub struct {name}Caller(mpsc::Sender<{name}Request>);", f"impl {name}Caller {{"]
    for method in methods(count):
        lines.append(
            f"    pub async fn {method.name}(&self, {method.taken}) -> Result<{method.reply}, Gone> {{\n"
            f"        let (reply, answer) = oneshot::channel();\n"
            f"        self.0.send({name}Request::{method.variant} {{ {method.converted}, reply }}).await.map_err(|_| Gone)?;\n"
            f"        answer.await.map_err(|_| Gone)\n    }}"
        )
    lines += ["}", f"impl {name} {{", *(f"    {method.definition}" for method in methods(count))]
    lines += [f"    async fn run(mut self, mut requests: mpsc::Receiver<{name}Request>) {{"]
    lines += ["        while let Some(request) = requests.recv().await {", "            match request {"]
    for method in methods(count):
        lines.append(
            f"                {name}Request::{method.variant} {{ {', '.join(method.names)}, reply }} => "
            f"{{ let _ = reply.send(self.{method.name}({method.passed()}){method.awaited}); }}"
        )
    start = (
        f"let (sender, receiver) = mpsc::channel(32);\n    tokio::spawn({name} {{ map: HashMap::new() }}.run(receiver));\n"
        f"    let store = {name}Caller(sender);"
    )
    return "\n".join([*lines, "            }", "        }", "    }", "}", *use(number, count, start)])


def with_kameo(number: int, count: int) -> str:
    """A message type and a handler for each method, behind a caller like the others'."""
    name = f"Store{number}"
    lines = ["#[derive(Actor)]", f"pub struct {name} {{ map: HashMap<String, String> }}"]
    for method in methods(count):
        message = name + method.variant
        lines += [
            f"pub struct {message} {{ {method.owned} }}",
            f"impl Message<{message}> for {name} {{",
            f"    type Reply = {method.reply};",
            f"    async fn handle(&mut self, message: {message}, _: &mut Context<Self, Self::Reply>) -> Self::Reply {{",
            f"        self.{method.name}({method.passed('message.')}){method.awaited}",
            "    }",
            "}",
            f"impl {name} {{ {method.definition} }}",
        ]
    lines += ["#[derive(Clone)]", f"pub struct {name}Caller(ActorRef<{name}>);", f"impl {name}Caller {{"]
    for method in methods(count):
        result = re.fullmatch(r"Result<(.*), (.*)>", method.reply)
        value, error = result.groups() if result else (method.reply, "kameo::error::Infallible")
        message = name + method.variant
        lines.append(
            f"    pub async fn {method.name}(&self, {method.taken}) -> Result<{value}, SendError<{message}, {error}>> {{\n"
            f"        self.0.ask({message} {{ {method.converted} }}).await\n    }}"
        )
    start = f"let store = {name}Caller({name}::spawn_with_mailbox({name} {{ map: HashMap::new() }}, mailbox::bounded(32)));"
    return "\n".join([*lines, "}", *use(number, count, start, ended=".ok()")])


def with_ractor(number: int, count: int) -> str:
    """An enum with a port for each reply, and a caller like the others'; its mailbox has no bound."""
    name = f"Store{number}"
    lines = [f"pub struct {name} {{ map: HashMap<String, String> }}", f"pub enum {name}Message {{"]
    for method in methods(count):
        lines.append(f"    {method.variant} {{ {method.owned}, reply: RpcReplyPort<{method.reply}> }},")
    lines += ["}", f"impl {name} {{", *(f"    {method.definition}" for method in methods(count))]
    lines += [
        "}",
        f"pub struct {name}Actor;",
        f"impl Actor for {name}Actor {{",
        f"    type Msg = {name}Message;",
        f"    type State = {name};",
        f"    type Arguments = {name};",
        f"    async fn pre_start(&self, _: ActorRef<{name}Message>, store: {name}) -> Result<{name}, ActorProcessingErr> {{ Ok(store) }}",
        f"    async fn handle(&self, _: ActorRef<{name}Message>, message: {name}Message, store: &mut {name}) -> Result<(), ActorProcessingErr> {{",
        "        match message {",
    ]
    for method in methods(count):
        lines.append(
            f"            {name}Message::{method.variant} {{ {', '.join(method.names)}, reply }} => "
            f"{{ let _ = reply.send(store.{method.name}({method.passed()}){method.awaited}); }}"
        )
    lines += ["        }", "        Ok(())", "    }", "}", "#[derive(Clone)]", f"pub struct {name}Caller(ActorRef<{name}Message>);", f"impl {name}Caller {{"]
    for method in methods(count):
        fields = "; ".join(f"let {field} = {field}.into()" for field in method.names)
        message = f"{name}Message::{method.variant} {{ {', '.join(method.names)}, reply }}"
        lines.append(
            f"    pub async fn {method.name}(&self, {method.taken}) -> Result<{method.reply}, Gone> {{\n"
            f"        {fields};\n"
            f"        match call!(self.0, |reply| {message}) {{ Ok(reply) => Ok(reply), Err(_) => Err(Gone) }}\n    }}"
        )
    start = f"let store = {name}Caller(Actor::spawn(None, {name}Actor, {name} {{ map: HashMap::new() }}).await.unwrap().0);"
    return "\n".join([*lines, "}", *use(number, count, start)])


KINDS = {"tenorite": with_tenorite, "by hand": by_hand, "kameo": with_kameo, "ractor": with_ractor}
HEADS = {
    "tenorite": "use std::collections::HashMap;\nuse tenorite::prelude::*;",
    "by hand": "use std::collections::HashMap;\nuse tokio::sync::{mpsc, oneshot};\n#[derive(Debug)]\npub struct Gone;",
    "kameo": "use std::collections::HashMap;\nuse kameo::Actor;\nuse kameo::actor::{ActorRef, Spawn};\nuse kameo::error::SendError;\n"
    "use kameo::mailbox;\nuse kameo::message::{Context, Message};",
    "ractor": "use std::collections::HashMap;\nuse ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, call};\n#[derive(Debug)]\npub struct Gone;",
}


def generate(kind: str, services: int, count: int) -> Path:
    folder = WORK / f"{kind.replace(' ', '-')}-{services}-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "src").mkdir(parents=True)
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "dozens"\nversion = "0.0.0"\nedition = "2024"\n\n[workspace]\n\n[dependencies]\n'
        f'tenorite = {{ path = "{ROOT / "tenorite"}" }}\n'
        'kameo = { version = "0.22", default-features = false, features = ["macros"] }\nractor = "0.16"\n'
        'tokio = { version = "1", features = ["macros", "rt-multi-thread", "sync", "time"] }\n\n'
        "[profile.release]\nstrip = true\n"
    )
    shutil.copy(ROOT / "benches/Cargo.lock", folder / "Cargo.lock")
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


@dataclass
class Program:
    """One program, and what was measured of it. Each of the lists has a figure a round."""

    kind: str
    folder: Path
    size: float
    lines: int
    cold: list[float]
    edited: list[float]

    @classmethod
    def of(cls, kind: str, services: int, count: int) -> "Program":
        folder = generate(kind, services, count)
        cargo(folder, "build")
        cargo(folder, "build", "--release")
        size = (WORK / "target/release/dozens").stat().st_size / 1024
        return cls(kind, folder, size, lines_of_ir(folder), [], [])

    def build_once(self, round_: int) -> None:
        source = self.folder / "src/main.rs"
        shutil.rmtree(WORK / "target/debug/incremental", ignore_errors=True)
        os.utime(source)
        self.cold.append(cargo(self.folder, "build"))
        source.write_text(source.read_text().replace("self.map.len() + ", f"self.map.len() + {round_} + ", 1))
        self.edited.append(cargo(self.folder, "build"))


def cell(mine: list[float], of_hand: list[float]) -> str:
    """The median, and that of the ratios of each round with their spread."""
    ratios = sorted(one / other for one, other in zip(mine, of_hand))
    spread = f", {ratios[0]:.2f}\N{EN DASH}{ratios[-1]:.2f}" if len(ratios) > 1 and ratios[0] != ratios[-1] else ""
    return f"{statistics.median(mine):,.1f} ({statistics.median(ratios):.2f}{spread})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--among", default=",".join(KINDS), help="kinds, with commas between them; by hand is always there")
    options = parser.parse_args()
    among = [kind.strip() for kind in options.among.split(",")]
    if unknown := [kind for kind in among if kind not in KINDS]:
        parser.error(f"there is no {unknown[0]}, only {', '.join(KINDS)}")
    kinds = [kind for kind in KINDS if kind in among or kind == "by hand"]
    print("Each figure with its ratio to by hand.\n")
    print("| program | | " + " | ".join(kinds) + " |\n|---|---|" + "---:|" * len(kinds))
    for services, count in [(options.services, 3), (1, 200)]:
        programs = [Program.of(kind, services, count) for kind in kinds]
        # Round by round, each in turn, so that what disturbs the machine disturbs all.
        for round_ in range(options.rounds):
            for program in programs:
                program.build_once(round_)
        hand = next(program for program in programs if program.kind == "by hand")
        name = f"{services} services of {count} methods" if services > 1 else f"{count} methods in one"
        for what, figures in {
            "size (KiB)": lambda program: [program.size],
            "IR (lines)": lambda program: [program.lines],
            "cold (s)": lambda program: program.cold,
            "edit (s)": lambda program: program.edited,
        }.items():
            cells = (cell(figures(program), figures(hand)) for program in programs)
            print(f"| {name} | {what} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
