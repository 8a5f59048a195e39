#!/usr/bin/env python3
"""What rust-analyzer shows of a derived caller: types at hovers, and methods at completions.

It needs rust-analyzer and rust-src (`rustup component add rust-analyzer rust-src`). Without them it
says so and succeeds.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SOURCE = '''
use std::io;

pub mod aliases {
    pub type Result<T> = std::result::Result<T, std::fmt::Error>;
}

pub type SearchResult<T> = Result<T, std::fmt::Error>;

pub struct Store {
    names: Vec<String>,
}

#[tenorite::service]
impl Store {
    pub fn value(&self) -> u8 { 1 }
    pub fn unit(&mut self) {}
    pub fn option(&self, key: &str) -> Option<String> { self.names.iter().find(|name| *name == key).cloned() }
    pub fn written(&self) -> Result<u16, String> { Ok(1) }
    pub fn standard(&self) -> io::Result<u32> { Ok(1) }
    pub async fn alias(&mut self) -> aliases::Result<u64> { Ok(1) }
    pub fn later(&mut self, reply: tenorite::Reply<Vec<i8>>) { drop(reply) }
    pub fn search(&self) -> SearchResult<i16> { Ok(1) }
    pub fn half(&self, key: &str) -> usize { match key.len() { 1 => , _ => self.names./*complete-self*/ } }
}

pub async fn calls(store: StoreCaller) -> Result<(), Box<dyn std::error::Error>> {
    let value/*u8*/ = store.value().await?;
    let unit/*()*/ = store.unit().await?;
    let option/*Option<String>*/ = store.option("a").await?;
    let written/*u16*/ = store.written().await?;
    let standard/*u32*/ = store.standard().await?;
    let alias/*u64*/ = store.alias().await?;
    let later/*Vec<i8>*/ = store.later().await?;
    let completed = store.option("a").await?./*complete-option*/;
    let called = store./*complete-caller*/;
    Ok(())
}
'''

COMPLETIONS = {
    "complete-self": ["len", "iter", "push"],
    "complete-option": ["unwrap_or", "map", "is_some"],
    "complete-caller": ["value", "half", "standard", "stats", "with_timeout"],
}


class Server:
    """Talks to a language server over its standard input and output."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            ["rust-analyzer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder
        )
        self.last_id = 0
        self.is_quiet = threading.Event()
        self.answers = {}
        self.arrived = threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def send(self, message):
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def read(self):
        stream = self.process.stdout
        while True:
            length = 0
            while (line := stream.readline().strip()):
                name, value = line.decode().split(": ")
                if name == "Content-Length":
                    length = int(value)
            if not length:
                return
            message = json.loads(stream.read(length))
            if message.get("method") == "experimental/serverStatus" and message["params"]["quiescent"]:
                self.is_quiet.set()
            elif "method" in message and "id" in message:
                self.send({"id": message["id"], "result": None})
            elif "id" in message:
                with self.arrived:
                    self.answers[message["id"]] = message
                    self.arrived.notify_all()

    def ask(self, method, params):
        self.last_id += 1
        wanted = self.last_id
        self.send({"id": wanted, "method": method, "params": params})
        with self.arrived:
            if not self.arrived.wait_for(lambda: wanted in self.answers, timeout=120):
                raise TimeoutError(method)
            return self.answers.pop(wanted).get("result")

    def tell(self, method, params):
        self.send({"method": method, "params": params})


def position(text: str, at: int):
    before = text[:at]
    return {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}


def main() -> int:
    if not shutil.which("rust-analyzer") or subprocess.run(
        ["rust-analyzer", "--version"], capture_output=True, check=False
    ).returncode:
        print("left out: rust-analyzer is not installed")
        return 0
    folder = Path(tempfile.mkdtemp())
    (folder / "src").mkdir()
    core = ROOT / "tenorite"
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "edited"\nversion = "0.1.0"\nedition = "2024"\n\n[workspace]\n\n'
        f'[dependencies]\ntenorite = {{ path = "{core}" }}\n'
    )
    shutil.copy(ROOT / "Cargo.lock", folder / "Cargo.lock")
    source = folder / "src/lib.rs"
    # Without what a user is about to type, so that the proc macro is built.
    source.write_text("pub use tenorite::prelude;\n")
    target = ROOT / "target/editor"
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    os.environ.update(environment)
    subprocess.run(["cargo", "check", "--quiet", "--offline"], cwd=folder, check=False)
    source.write_text(SOURCE)

    server = Server(folder)
    server.ask(
        "initialize",
        {
            "processId": os.getpid(),
            "rootUri": folder.as_uri(),
            "capabilities": {"experimental": {"serverStatusNotification": True}},
            "initializationOptions": {"checkOnSave": False, "procMacro": {"enable": True}, "cargo": {"buildScripts": {"enable": True}}},
        },
    )
    server.tell("initialized", {})
    document = {"uri": source.as_uri()}
    server.tell("textDocument/didOpen", {"textDocument": {**document, "languageId": "rust", "version": 1, "text": SOURCE}})
    if not server.is_quiet.wait(timeout=300):
        print("rust-analyzer did not come to rest")
        return 1

    failed = 0
    start = SOURCE.index("pub async fn calls")
    for line in SOURCE[start:].splitlines():
        if "/*" not in line or "complete" in line:
            continue
        name, ty = line.split("let ")[1].split(" =")[0].rstrip("*/").split("/*")
        at = SOURCE.index(line) + line.index(name)
        hover = server.ask("textDocument/hover", {"textDocument": document, "position": position(SOURCE, at + 1)})
        text = hover["contents"]["value"] if hover else "nothing"
        shown = f"let {name}: {ty}" in text
        print(f"{'ok' if shown else 'NOT'} {name}: {ty}" + ("" if shown else f", but {text}"))
        failed += not shown
    for marker, wanted in COMPLETIONS.items():
        at = SOURCE.index(f"/*{marker}*/")
        found = server.ask("textDocument/completion", {"textDocument": document, "position": position(SOURCE, at)})
        items = found["items"] if isinstance(found, dict) else found or []
        labels = [item["label"].split("(")[0] for item in items]
        missing = [name for name in wanted if name not in labels]
        print(f"{'NOT' if missing else 'ok'} {marker}: {len(labels)} completions" + (f", without {missing}" if missing else ""))
        failed += bool(missing)
    server.process.kill()
    shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
