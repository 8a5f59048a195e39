//! A connection to a server that can be cut or held up, while the server and all others stay.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub struct Proxy {
    port: u16,
    is_cut: Arc<watch::Sender<bool>>,
    is_held: Arc<watch::Sender<bool>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn to(url: String) -> Self {
        let server = url.strip_prefix("nats://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let is_cut = Arc::new(watch::Sender::new(false));
        let is_held = Arc::new(watch::Sender::new(false));
        let (cut, held) = (Arc::clone(&is_cut), Arc::clone(&is_held));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let (mut cut, held) = (cut.subscribe(), held.subscribe());
                let server = server.clone();
                connections.spawn(async move {
                    let forward = async {
                        let mut server = TcpStream::connect(server).await?;
                        let (from_client, mut to_client) = client.split();
                        let (mut from_server, to_server) = server.split();
                        let answers = copy(&mut from_server, &mut to_client);
                        tokio::try_join!(answers, copy_unless_held(from_client, to_server, held)).map(drop)
                    };
                    tokio::select! {
                        _ = cut.wait_for(|is_cut| *is_cut) => {}
                        _ = forward => {}
                    }
                });
            }
        });
        Self { port, is_cut, is_held, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn cut(&self) {
        self.is_cut.send_replace(true);
    }

    pub fn mend(&self) {
        self.is_cut.send_replace(false);
    }

    /// Keeps what clients send until [`release`](Self::release). What the server sends gets through.
    pub fn hold(&self) {
        self.is_held.send_replace(true);
    }

    pub fn release(&self) {
        self.is_held.send_replace(false);
    }
}

async fn copy_unless_held(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut held: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        // It fails only if the proxy is gone.
        let _ = held.wait_for(|is_held| !is_held).await;
        to.write_all(&buffer[..read]).await?;
    }
}
