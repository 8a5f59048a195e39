//! What actor frameworks have for actors in other processes, in the shape of the other contestants: without an engine in between.

/// kameo's remote actors: libp2p, by TCP, encrypted with noise (there is no other way), MessagePack in CBOR.
pub mod by_kameo {
    use std::time::Duration;

    use futures_util::StreamExt;
    use kameo::actor::{RemoteActorRef, Spawn};
    use kameo::message::{Context, Message};
    use kameo::remote::{Behaviour, messaging};
    use kameo::{Actor, RemoteActor, remote_message};
    use libp2p::identity::Keypair;
    use libp2p::{Multiaddr, Swarm, SwarmBuilder, noise, tcp, yamux};

    const NAME: &str = "echo";

    #[derive(Actor, RemoteActor)]
    pub struct Echo;

    #[derive(serde::Serialize, serde::Deserialize)]
    pub struct Say(String);

    #[remote_message("say")]
    impl Message<Say> for Echo {
        type Reply = String;

        async fn handle(&mut self, Say(text): Say, _: &mut Context<Self, Self::Reply>) -> String {
            text
        }
    }

    pub type Client = RemoteActorRef<Echo>;

    /// The service's, so that its callers need not be told.
    fn known() -> Keypair {
        Keypair::ed25519_from_bytes([7; 32]).expect("it is as long as it should be")
    }

    fn swarm(key: Keypair) -> Swarm<Behaviour> {
        let swarm = SwarmBuilder::with_existing_identity(key)
            .with_tokio()
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
            .expect("there is noise");
        let swarm = swarm
            .with_behaviour(|key| Behaviour::new(key.public().to_peer_id(), messaging::Config::default()))
            .expect("it cannot fail")
            .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(3600)))
            .build();
        swarm.behaviour().init_global();
        swarm
    }

    fn run(mut swarm: Swarm<Behaviour>) {
        tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
    }

    fn multiaddr(address: &str) -> Multiaddr {
        let (host, port) = address.split_once(':').expect("it has a port");
        format!("/ip4/{host}/tcp/{port}").parse().expect("it is an address")
    }

    pub async fn serve(address: &str) {
        let mut swarm = swarm(known());
        swarm.listen_on(multiaddr(address)).expect("it can listen");
        run(swarm);
        let actor = Echo::spawn(Echo);
        while actor.register(NAME).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        actor.wait_for_shutdown().await;
    }

    pub async fn connect(address: &str) -> Client {
        // A peer that cannot be reached at once is forgotten.
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut swarm = swarm(Keypair::generate_ed25519());
        swarm.add_peer_address(known().public().to_peer_id(), multiaddr(address));
        swarm.dial(multiaddr(address)).expect("it is an address");
        run(swarm);
        loop {
            if let Ok(Some(actor)) = Client::lookup(NAME).await {
                return actor;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn echo(client: &Client, text: String) -> String {
        client.ask(&Say(text)).await.expect("it is answered")
    }
}

/// ractor's cluster: protocol buffers by TCP, arguments as their bytes.
pub mod by_ractor {
    use std::time::Duration;

    use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, pg};
    use ractor_cluster::{NodeServer, NodeServerMessage, RactorClusterMessage, client_connect};

    const GROUP: &str = "echo";

    struct Echo;

    #[derive(RactorClusterMessage)]
    pub enum Ask {
        #[rpc]
        Say(String, RpcReplyPort<String>),
    }

    impl Actor for Echo {
        type Msg = Ask;
        type State = ();
        type Arguments = ();

        async fn pre_start(&self, _: ActorRef<Ask>, (): ()) -> Result<(), ActorProcessingErr> {
            Ok(())
        }

        async fn handle(&self, _: ActorRef<Ask>, ask: Ask, (): &mut ()) -> Result<(), ActorProcessingErr> {
            match ask {
                Ask::Say(text, reply) => reply.send(text)?,
            }
            Ok(())
        }
    }

    pub type Client = ActorRef<Ask>;

    async fn node(name: &str, port: u16) -> ActorRef<NodeServerMessage> {
        let (name, host) = (name.to_owned(), "localhost".to_owned());
        let server = NodeServer::new(port, "cookie".to_owned(), name, host, None, None);
        Actor::spawn(None, server, ()).await.expect("it can listen").0
    }

    pub async fn serve(address: &str) {
        let (_, port) = address.split_once(':').expect("it has a port");
        let _node = node("service", port.parse().expect("it is a port")).await;
        let (actor, task) = Actor::spawn(None, Echo, ()).await.expect("it starts");
        pg::join(GROUP.to_owned(), vec![actor.get_cell()]);
        task.await.expect("it runs on");
    }

    pub async fn connect(address: &str) -> Client {
        let node = node("caller", 0).await;
        while client_connect(&node, address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        loop {
            if let Some(actor) = pg::get_members(&GROUP.to_owned()).into_iter().next() {
                return actor.into();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn echo(client: &Client, text: String) -> String {
        let reply = client.call(|reply| Ask::Say(text, reply), None).await.expect("it is there");
        reply.expect("it is answered")
    }
}
