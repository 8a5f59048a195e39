//! Shards among owners that come and go: each has its share, and no call fails or waits for that.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tenorite_nats::{Nats, ServingShards, ShardInfo, ShardState, connect_shards, serve_shards};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::server::Server;
use crate::shards::{Ledger, LedgerCaller, LedgerRequest};

/// Within so much of a change each owner has its share, on a machine that has other things to do. It prints
/// how long that took: a second or two.
const WITHIN: Duration = Duration::from_secs(30);
/// A call to a shard that moves may take so much longer than one to a shard that does not.
const SLACK: Duration = Duration::from_millis(100);
/// A shard does not move for balance twice in less than this.
const APART: Duration = Duration::from_secs(3);

async fn own(server: &Server, name: &str, shards: u32) -> ServingShards {
    own_of(server, "test", name, shards).await
}

async fn own_of(server: &Server, prefix: &str, name: &str, shards: u32) -> ServingShards {
    let serving = serve_shards(server.connect().await, prefix, |_| Ledger::default());
    serving.shards(shards).name(name).await.unwrap()
}

fn owned(serving: &ServingShards) -> usize {
    serving.shards().iter().filter(|shard| shard.state == ShardState::Owned).count()
}

/// Waits until the owners have so many shards. Returns how long that took.
async fn until(owners: &[&ServingShards], shares: &[usize]) -> Duration {
    let began = Instant::now();
    loop {
        let mut there: Vec<_> = owners.iter().map(|serving| owned(serving)).collect();
        there.sort_unstable();
        if there == shares {
            return began.elapsed();
        }
        assert!(began.elapsed() < WITHIN, "{there:?}, and not {shares:?}, after {:?}", began.elapsed());
        let changes = owners.iter().map(|serving| {
            let mut watch = serving.watch();
            Box::pin(async move { watch.changed().await.map(drop) })
        });
        let any = futures_util::future::select_all(changes);
        let _ = tokio::time::timeout(Duration::from_millis(50), any).await;
    }
}

/// An account of each shard.
fn accounts(shards: u32) -> BTreeMap<u32, String> {
    let mut accounts = BTreeMap::new();
    for number in 0.. {
        let account = format!("account {number}");
        let shard = tenorite::Sharded::shard(&LedgerRequest::Read { account: account.clone() }, shards);
        accounts.entry(shard.unwrap()).or_insert(account);
        if accounts.len() == shards as usize {
            break;
        }
    }
    accounts
}

fn note(slowest: &Mutex<Duration>, took: Duration) {
    let mut slowest = slowest.lock().unwrap();
    *slowest = took.max(*slowest);
}

/// Calls each shard without a pause, and keeps the slowest call and every error.
struct Load {
    prefix: String,
    stop: CancellationToken,
    callers: JoinSet<(String, u32)>,
    slowest: Arc<Mutex<Duration>>,
}

impl Load {
    async fn start(nats: Nats, shards: u32) -> Self {
        Self::start_of(nats, "test", shards).await
    }

    async fn start_of(nats: Nats, prefix: &str, shards: u32) -> Self {
        let ledger: LedgerCaller = connect_shards(nats, prefix).await.unwrap();
        let (stop, slowest) = (CancellationToken::new(), Arc::<Mutex<Duration>>::default());
        let mut callers = JoinSet::new();
        for account in accounts(shards).into_values() {
            let (ledger, stop, slowest) = (ledger.clone(), stop.clone(), Arc::clone(&slowest));
            callers.spawn(async move {
                let mut entry = 0;
                while !stop.is_cancelled() {
                    let began = Instant::now();
                    let count = ledger.write(&account, entry).await;
                    assert_eq!(count, Ok(entry as usize + 1), "{account}");
                    let took = began.elapsed();
                    note(&slowest, took);
                    entry += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                (account, entry)
            });
        }
        Self { prefix: prefix.to_owned(), stop, callers, slowest }
    }

    fn slowest(&self) -> Duration {
        std::mem::take(&mut self.slowest.lock().unwrap())
    }

    /// Every write that was acknowledged is there, in its order.
    async fn end(mut self, nats: Nats) {
        self.stop.cancel();
        let ledger: LedgerCaller = connect_shards(nats, &self.prefix).await.unwrap();
        while let Some(caller) = self.callers.join_next().await {
            let (account, entries) = caller.unwrap();
            assert!(entries > 0, "{account} has only {entries} entries");
            assert_eq!(ledger.read(account).await, Ok((0..entries).collect::<Vec<_>>()));
        }
    }
}

/// Notes when each shard is taken by an owner.
fn note_moves(name: &'static str, serving: &ServingShards, moves: &Moves) {
    let (mut watch, moves) = (serving.watch(), Arc::clone(moves));
    let mut before = Vec::new();
    tokio::spawn(async move {
        while let Some(shards) = watch.changed().await {
            for shard in shards {
                let is_owned = shard.state == ShardState::Owned;
                before.resize(before.len().max(shard.shard as usize + 1), false);
                if is_owned && !before[shard.shard as usize] {
                    moves.lock().unwrap().push((shard.shard, name, Instant::now()));
                }
                before[shard.shard as usize] = is_owned;
            }
        }
    });
}

type Moves = Arc<Mutex<Vec<(u32, &'static str, Instant)>>>;

#[tokio::test(flavor = "multi_thread")]
async fn owners_that_come_and_go_have_their_share_and_no_call_waits_for_it() {
    const SHARDS: u32 = 16;
    let Some(server) = Server::start() else { return };
    let moves = Moves::default();
    let first = own(&server, "first", SHARDS).await;
    note_moves("first", &first, &moves);
    let load = Load::start(server.connect().await, SHARDS).await;
    // These shards keep their owner. Calls to them show how slow the machine is meanwhile. They are few,
    // so that they add little to the load.
    const STILL: u32 = 2;
    let still = own_of(&server, "still", "still", STILL).await;
    let still_load = Load::start_of(server.connect().await, "still", STILL).await;
    until(&[&first], &[16]).await;
    until(&[&still], &[2]).await;
    let compare = || {
        let (slowest, usual) = (load.slowest(), still_load.slowest());
        assert!(slowest < usual + SLACK, "a call took {slowest:?}, and {usual:?} where no shard moved");
    };
    // A shard that has just been taken is kept for a while.
    tokio::time::sleep(APART).await;
    // What it took to start is not looked at.
    load.slowest();
    still_load.slowest();

    let second = own(&server, "second", SHARDS).await;
    note_moves("second", &second, &moves);
    println!("the second has its share after {:?}", until(&[&first, &second], &[8, 8]).await);
    tokio::time::sleep(APART).await;
    let third = own(&server, "third", SHARDS).await;
    note_moves("third", &third, &moves);
    println!("the third after {:?}", until(&[&first, &second, &third], &[5, 5, 6]).await);
    compare();

    let owner_of =
        |serving: &ServingShards| serving.shards().into_iter().map(|shard| shard.owner).collect::<Vec<_>>();
    // An owner hears of the others' shards from them, a little after it has its own.
    let mut told = first.watch();
    let began = Instant::now();
    while owner_of(&first) != owner_of(&second) || owner_of(&first).contains(&None) {
        assert!(began.elapsed() < WITHIN, "{:?} and {:?}", owner_of(&first), owner_of(&second));
        let _ = tokio::time::timeout(Duration::from_millis(50), told.changed()).await;
    }

    // What stops hands its shards to the one that stands by for each: the others keep theirs.
    second.stop().await;
    println!("two have all after {:?}", until(&[&first, &third], &[8, 8]).await);
    compare();
    load.end(server.connect().await).await;
    still_load.end(server.connect().await).await;

    let moves = moves.lock().unwrap().clone();
    for shard in 0..SHARDS {
        let of: Vec<_> = moves.iter().filter(|(moved, ..)| *moved == shard).collect();
        for pair in of.windows(2) {
            let (earlier, later) = (pair[0], pair[1]);
            let is_for_balance = later.1 != "first" && earlier.1 != "second";
            if is_for_balance {
                assert!(later.2 - earlier.2 >= APART - SLACK, "shard {shard} moved twice: {of:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_that_start_together_share_from_the_start() {
    const SHARDS: u32 = 16;
    let Some(server) = Server::start() else { return };
    let (first, second, third) = tokio::join!(
        own(&server, "first", SHARDS),
        own(&server, "second", SHARDS),
        own(&server, "third", SHARDS)
    );
    let load = Load::start(server.connect().await, SHARDS).await;
    println!("all have their share after {:?}", until(&[&first, &second, &third], &[5, 5, 6]).await);
    // And it stays as it is.
    let before = first.shards();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let owned = |shards: &[ShardInfo]| {
        shards.iter().map(|shard| shard.state == ShardState::Owned).collect::<Vec<_>>()
    };
    assert_eq!(owned(&before), owned(&first.shards()));
    let stats: Vec<_> = [&first, &second, &third].map(ServingShards::shards).concat();
    assert!(stats.iter().filter(|shard| shard.state == ShardState::Owned).all(|shard| {
        shard.requests > 0 && shard.errors == 0 && shard.taken == 1 && shard.size > 0 && shard.revision > 0
    }));
    load.end(server.connect().await).await;
}

/// Idle, each shard has a pull of its owner and one of the next, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_pulls_wait_than_shards_and_one_to_stand_by() {
    const SHARDS: u32 = 32;
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let mut owners = Vec::new();
    for name in 0..4 {
        owners.push(own(&server, &name.to_string(), SHARDS).await);
    }
    // So that each shard is owned.
    let load = Load::start(nats.clone(), SHARDS).await;
    until(&owners.iter().collect::<Vec<_>>(), &[8, 8, 8, 8]).await;
    load.end(nats.clone()).await;
    // Pulls that were given up last as long as a pull does.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let stream =
        async_nats::jetstream::new(nats.client().clone()).get_stream("TENORITE_test_Ledger").await.unwrap();
    let began = Instant::now();
    loop {
        let mut waiting = 0;
        for shard in 0..SHARDS {
            waiting += stream.consumer_info(format!("shard-{shard}")).await.unwrap().num_waiting;
        }
        if waiting <= 2 * SHARDS as usize {
            break;
        }
        // A pull may have been renewed while this looked.
        assert!(began.elapsed() < WITHIN, "{waiting} pulls for {SHARDS} shards");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_weight_is_a_larger_share() {
    const SHARDS: u32 = 9;
    let Some(server) = Server::start() else { return };
    let large = serve_shards(server.connect().await, "test", |_| Ledger::default()).shards(SHARDS).weight(2);
    let large = large.name("large").await.unwrap();
    let small = own(&server, "small", SHARDS).await;
    let load = Load::start(server.connect().await, SHARDS).await;
    until(&[&small, &large], &[3, 6]).await;
    assert_eq!(owned(&large), 6);
    load.end(server.connect().await).await;
}
