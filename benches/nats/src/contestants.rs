//! A service that says what it is told, five times.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use tenorite::prelude::*;
use tenorite_nats::{Nats, Postcard};

#[cfg(feature = "peers")]
use crate::peers::{by_kameo, by_ractor};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    AsyncNats,
    /// With as much said in a header as a call of Tenorite says in its payload.
    OneHeader,
    Tenorite,
    Postcard,
    Shards,
    Tonic,
    #[cfg(feature = "peers")]
    Kameo,
    #[cfg(feature = "peers")]
    Ractor,
}

impl Kind {
    pub const ALL: &[Self] = &[
        Self::AsyncNats,
        Self::OneHeader,
        Self::Tenorite,
        Self::Postcard,
        Self::Shards,
        Self::Tonic,
        #[cfg(feature = "peers")]
        Self::Kameo,
        #[cfg(feature = "peers")]
        Self::Ractor,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::AsyncNats => "async-nats, request",
            Self::OneHeader => "async-nats, one header",
            Self::Tenorite => "tenorite-nats",
            Self::Postcard => "tenorite-nats, postcard",
            Self::Shards => "tenorite-nats, shards",
            Self::Tonic => "tonic",
            #[cfg(feature = "peers")]
            Self::Kameo => "kameo, remote",
            #[cfg(feature = "peers")]
            Self::Ractor => "ractor, cluster",
        }
    }

    /// Whether it goes by way of the server.
    pub fn is_by_nats(self) -> bool {
        matches!(self, Self::AsyncNats | Self::OneHeader | Self::Tenorite | Self::Postcard | Self::Shards)
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

pub struct Echo;

#[tenorite::service(serde)]
impl Echo {
    pub fn echo(&mut self, text: String) -> String {
        text
    }
}

/// As [`Echo`], in a shard.
#[derive(Default)]
pub struct Ledger {
    echoed: u64,
}

impl serde::Serialize for Ledger {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.echoed.serialize(serializer)
    }
}

impl<'de> serde::Deserialize<'de> for Ledger {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(|echoed| Self { echoed })
    }
}

#[tenorite::service(serde)]
impl Ledger {
    pub fn echo(&mut self, #[service(key)] key: u8, text: String) -> String {
        self.echoed += u64::from(key);
        text
    }
}

#[derive(Clone)]
pub enum Contestant {
    AsyncNats(async_nats::Client),
    OneHeader(async_nats::Client),
    Tenorite(EchoCaller),
    Shards(LedgerCaller),
    Tonic(rpc::Client),
    #[cfg(feature = "peers")]
    Kameo(by_kameo::Client),
    #[cfg(feature = "peers")]
    Ractor(by_ractor::Client),
}

impl Contestant {
    pub async fn echo(&self, text: String) -> String {
        match self {
            Self::AsyncNats(client) => {
                let reply = client.request("bare.echo", text.into()).await.expect("it is answered");
                String::from_utf8(reply.payload.into()).expect("it is text")
            }
            Self::OneHeader(client) => {
                let mut headers = async_nats::HeaderMap::new();
                headers.insert(
                    "Tenorite",
                    format!("1 json 5f0c8d3a77e01b42 {} {}", 30_000, 1_764_115_200_000_u64),
                );
                let reply = client.request_with_headers("headed.echo", headers, text.into()).await;
                String::from_utf8(reply.expect("it is answered").payload.into()).expect("it is text")
            }
            Self::Tenorite(caller) => caller.echo(text).await.expect("it is answered"),
            Self::Shards(caller) => caller.echo(1, text).await.expect("it is answered"),
            Self::Tonic(client) => client.clone().echo(text).await,
            #[cfg(feature = "peers")]
            Self::Kameo(client) => by_kameo::echo(client, text).await,
            #[cfg(feature = "peers")]
            Self::Ractor(client) => by_ractor::echo(client, text).await,
        }
    }
}

pub async fn serve(kind: Kind, url: &str) {
    match kind {
        Kind::AsyncNats | Kind::OneHeader => {
            let client = async_nats::connect(url).await.expect("the server is there");
            let subject = if kind == Kind::OneHeader { "headed.echo" } else { "bare.echo" };
            let mut requests = client.subscribe(subject).await.expect("it can be heard");
            while let Some(request) = requests.next().await {
                let text = String::from_utf8(request.payload.into()).expect("it is text");
                let reply = request.reply.expect("somebody waits");
                client.publish(reply, Bytes::from(text)).await.expect("it can be sent");
            }
        }
        Kind::Tenorite | Kind::Postcard => {
            let nats = Nats::connect(url).await.expect("the server is there");
            let (_task, local) = EchoService.start_task(1024, Echo);
            let serving = if kind == Kind::Postcard {
                tenorite_nats::serve(nats, "postcard", local).codec(Postcard).await
            } else {
                tenorite_nats::serve(nats, "json", local).await
            };
            serving.expect("it can be served").ended().await;
        }
        Kind::Shards => {
            let nats = Nats::connect(url).await.expect("the server is there");
            let owning = tenorite_nats::serve_shards(nats, "shards", |_| Ledger::default()).await;
            let _owning = owning.expect("it can be served");
            std::future::pending().await
        }
        Kind::Tonic => rpc::serve(url).await,
        #[cfg(feature = "peers")]
        Kind::Kameo => by_kameo::serve(url).await,
        #[cfg(feature = "peers")]
        Kind::Ractor => by_ractor::serve(url).await,
    }
}

/// Once it is served.
pub async fn connect(kind: Kind, url: &str) -> Contestant {
    let contestant = match kind {
        Kind::AsyncNats => {
            Contestant::AsyncNats(async_nats::connect(url).await.expect("the server is there"))
        }
        Kind::OneHeader => {
            Contestant::OneHeader(async_nats::connect(url).await.expect("the server is there"))
        }
        Kind::Tenorite => {
            let nats = Nats::connect(url).await.expect("the server is there");
            Contestant::Tenorite(tenorite_nats::connect(nats, "json").await.expect("it can be called"))
        }
        Kind::Postcard => {
            let nats = Nats::connect(url).await.expect("the server is there");
            let caller = tenorite_nats::connect(nats, "postcard").codec(Postcard).await;
            Contestant::Tenorite(caller.expect("it can be called"))
        }
        Kind::Shards => {
            let nats = Nats::connect(url).await.expect("the server is there");
            let caller = tenorite_nats::connect_shards(nats, "shards").shards(1).await;
            Contestant::Shards(caller.expect("it can be called"))
        }
        Kind::Tonic => Contestant::Tonic(rpc::connect(url).await),
        #[cfg(feature = "peers")]
        Kind::Kameo => Contestant::Kameo(by_kameo::connect(url).await),
        #[cfg(feature = "peers")]
        Kind::Ractor => Contestant::Ractor(by_ractor::connect(url).await),
    };
    loop {
        let answers = match &contestant {
            Contestant::AsyncNats(client) => client.request("bare.echo", "x".into()).await.is_ok(),
            Contestant::OneHeader(client) => client.request("headed.echo", "x".into()).await.is_ok(),
            Contestant::Tenorite(caller) => caller.echo("x").await.is_ok(),
            Contestant::Shards(caller) => caller.echo(1, "x").await.is_ok(),
            _ => true,
        };
        if answers {
            return contestant;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What `tonic-build` would have written, without a compiler for protocol buffers.
mod rpc {
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use std::time::Duration;

    use tonic::body::Body;
    use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse, uri::PathAndQuery};
    use tonic::codegen::{Body as HttpBody, Service, StdError};
    use tonic::server::{Grpc, NamedService, UnaryService};
    use tonic::transport::{Channel, Endpoint, Server};
    use tonic::{Request, Response, Status};
    use tonic_prost::ProstCodec;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Text {
        #[prost(string, tag = "1")]
        pub text: String,
    }

    #[derive(Clone)]
    struct Echo;

    impl UnaryService<Text> for Echo {
        type Response = Text;
        type Future = std::future::Ready<Result<Response<Text>, Status>>;

        fn call(&mut self, request: Request<Text>) -> Self::Future {
            std::future::ready(Ok(Response::new(request.into_inner())))
        }
    }

    impl NamedService for Echo {
        const NAME: &'static str = "bench.Echo";
    }

    impl<B> Service<HttpRequest<B>> for Echo
    where
        B: HttpBody + Send + 'static,
        B::Error: Into<StdError> + Send + 'static,
    {
        type Response = HttpResponse<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: HttpRequest<B>) -> Self::Future {
            Box::pin(async move {
                let mut grpc = Grpc::new(ProstCodec::<Text, Text>::default());
                Ok(grpc.unary(Echo, request).await)
            })
        }
    }

    pub async fn serve(address: &str) {
        let address = address.parse().expect("it is an address");
        Server::builder().tcp_nodelay(true).add_service(Echo).serve(address).await.expect("it can be served");
    }

    #[derive(Clone)]
    pub struct Client(tonic::client::Grpc<Channel>);

    pub async fn connect(address: &str) -> Client {
        let endpoint =
            Endpoint::from_shared(format!("http://{address}")).expect("it is an address").tcp_nodelay(true);
        loop {
            if let Ok(channel) = endpoint.connect().await {
                return Client(tonic::client::Grpc::new(channel));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    impl Client {
        pub async fn echo(&mut self, text: String) -> String {
            self.0.ready().await.expect("it is there");
            let path = PathAndQuery::from_static("/bench.Echo/Echo");
            let codec = ProstCodec::<Text, Text>::default();
            let reply = self.0.unary(Request::new(Text { text }), path, codec).await;
            reply.expect("it is answered").into_inner().text
        }
    }
}
