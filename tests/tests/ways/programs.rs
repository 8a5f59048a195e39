//! Small programs of the kinds that are written with services, each in the lines that its logic
//! has.
//!
//! What each would have by hand besides is said with it. `Script` of a thread of its own is in
//! `local`, a database in `tenorite-example/examples/sqlite.rs`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Registry, Supervisor};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// A chat: a room for each name, which is there as long as it is used. By hand: a registry (45
/// lines), and a timer for each room.
mod chat {
    use super::*;

    #[derive(Clone, Default)]
    pub struct Room {
        members: HashMap<String, mpsc::UnboundedSender<String>>,
    }

    #[tenorite::service]
    impl Room {
        /// The stream of what is said, from now on.
        pub fn join(&mut self, name: String) -> mpsc::UnboundedReceiver<String> {
            let (sender, receiver) = mpsc::unbounded_channel();
            self.members.insert(name, sender);
            receiver
        }

        /// Returns how many have heard it.
        pub fn say(&mut self, name: &str, text: &str) -> usize {
            self.members.retain(|_, member| !member.is_closed());
            let heard = self.members.values().filter(|member| member.send(format!("{name}: {text}")).is_ok());
            heard.count()
        }
    }

    pub type Rooms = Registry<String, RoomCaller>;

    pub fn rooms(app: &Supervisor) -> Rooms {
        let handle = app.handle();
        Rooms::new(move |name| {
            let room = RoomService.builder().idle_timeout(Duration::from_secs(60));
            handle.start(name, room, 64, Room::default())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_chat_has_rooms_as_long_as_they_are_used() {
    let app = Supervisor::new("chat");
    let rooms = chat::rooms(&app);
    let theirs = rooms.clone();
    let evening = async move {
        let hall = "hall".to_owned();
        let mut ada = theirs.call(&hall, |room| room.join("ada")).await.unwrap();
        let ben = theirs.call(&hall, |room| room.join("ben")).await.unwrap();
        assert_eq!(theirs.call(&hall, |room| room.say("ada", "hello")).await, Ok(2));
        assert_eq!(ada.recv().await.as_deref(), Some("ada: hello"));
        drop(ben);
        assert_eq!(theirs.call(&hall, |room| room.say("ada", "ben?")).await, Ok(1));
        sleep(Duration::from_secs(61)).await;
        assert!(theirs.is_empty(), "an empty room is closed");
        assert_eq!(ada.recv().await.as_deref(), Some("ada: ben?"));
        assert_eq!(ada.recv().await, None, "its stream ends");
    };
    assert!(app.run_until(evening).await.is_clean());
}

/// A cache that fetches what it does not have once, however many ask, and forgets it. By hand:
/// single flight (20 lines), a timer (7 to 11), and the shutdown of both.
mod cache {
    use super::*;

    pub struct Cache {
        pages: HashMap<u32, (Arc<str>, Instant)>,
        asking: HashMap<u32, Vec<Reply<Arc<str>>>>,
        fetches: Arc<AtomicU32>,
    }

    impl Cache {
        pub fn new(fetches: Arc<AtomicU32>) -> Self {
            Self { pages: HashMap::new(), asking: HashMap::new(), fetches }
        }
    }

    #[tenorite::service]
    impl Cache {
        pub fn get(&mut self, page: u32, reply: Reply<Arc<str>>, me: SelfCaller<CacheCaller>) {
            if let Some((text, _)) = self.pages.get(&page) {
                let _ = reply.send(Arc::clone(text));
                return;
            }
            let asking = self.asking.entry(page).or_default();
            asking.push(reply);
            if asking.len() == 1 {
                self.fetches.fetch_add(1, Ordering::SeqCst);
                let fetch = async move {
                    sleep(Duration::from_millis(100)).await;
                    (page, Arc::from(format!("page {page}")))
                };
                // Once a stop has begun, the replies end with it.
                let _ = me.spawn(fetch, |me, (page, text)| me.fetched(page, text));
            }
        }

        pub fn fetched(&mut self, page: u32, text: Arc<str>) {
            for reply in self.asking.remove(&page).into_iter().flatten() {
                let _ = reply.send(Arc::clone(&text));
            }
            self.pages.insert(page, (text, Instant::now()));
        }

        #[service(every = "1s")]
        fn forget(&mut self) {
            self.pages.retain(|_, (_, fetched)| fetched.elapsed() < Duration::from_secs(10));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cache_fetches_each_page_once_and_forgets_it() {
    let fetches = Arc::new(AtomicU32::new(0));
    let (task, cache) = cache::CacheService.start_task(64, cache::Cache::new(Arc::clone(&fetches)));
    let asked = futures::future::join_all((0..20).map(|n| cache.get(n % 2))).await;
    assert!(asked.into_iter().zip(0..).all(|(text, n)| *text.unwrap() == *format!("page {}", n % 2)));
    assert_eq!(fetches.load(Ordering::SeqCst), 2);
    assert_eq!(&*cache.get(0).await.unwrap(), "page 0");
    sleep(Duration::from_secs(12)).await;
    assert_eq!(&*cache.get(0).await.unwrap(), "page 0");
    assert_eq!(fetches.load(Ordering::SeqCst), 3);
    // A stop waits for the page that is being fetched, and its caller gets it.
    let mut last = Box::pin(cache.get(7));
    assert!(tenorite_tests::poll_once(&mut last).is_pending());
    cache.stop();
    assert_eq!(&*last.await.unwrap(), "page 7");
    task.await.unwrap();
}

/// Runs jobs, a few at a time, and those that fail once more after a while. By hand: a semaphore, a
/// set of tasks, a channel back for their results, timers, and a shutdown that loses none.
mod jobs {
    use super::*;

    const AT_ONCE: usize = 2;

    #[derive(Default)]
    pub struct Jobs {
        waiting: VecDeque<(u32, u32)>,
        running: usize,
        pub done: Vec<(u32, u32)>,
    }

    #[tenorite::service]
    impl Jobs {
        pub fn add(&mut self, job: u32, me: SelfCaller<JobsCaller>) -> Result<(), SendReason> {
            self.again(job, 1, me)
        }

        pub fn again(&mut self, job: u32, tries: u32, me: SelfCaller<JobsCaller>) -> Result<(), SendReason> {
            self.waiting.push_back((job, tries));
            self.run(&me)
        }

        pub fn ended(&mut self, job: u32, tries: u32, is_done: bool, me: SelfCaller<JobsCaller>) {
            self.running -= 1;
            if is_done {
                self.done.push((job, tries));
            } else {
                let later = me.after(Duration::from_secs(1), move |me| me.again(job, tries + 1));
                drop(later.map(tenorite::DelayedCall::detach));
            }
            let _ = self.run(&me);
        }

        pub fn done(&self) -> Vec<(u32, u32)> {
            self.done.clone()
        }

        fn run(&mut self, me: &SelfCaller<JobsCaller>) -> Result<(), SendReason> {
            while self.running < AT_ONCE
                && let Some((job, tries)) = self.waiting.pop_front()
            {
                self.running += 1;
                let work = async move {
                    sleep(Duration::from_millis(100)).await;
                    (job, tries, job.is_multiple_of(2) || tries > 1)
                };
                me.spawn(work, |me, (job, tries, is_done)| me.ended(job, tries, is_done))?;
            }
            Ok(())
        }
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_run_a_few_at_a_time_and_once_more_if_they_fail() {
    let (task, jobs) = jobs::JobsService.start_task(64, jobs::Jobs::default());
    let began = Instant::now();
    for job in 0..4 {
        jobs.add(job).await.unwrap();
    }
    sleep(Duration::from_millis(150)).await;
    assert_eq!(jobs.done().await.unwrap(), [(0, 1)]);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(jobs.done().await.unwrap(), [(0, 1), (2, 1), (1, 2), (3, 2)]);
    jobs.add(8).await.unwrap();
    drop(jobs);
    assert_eq!(task.await.unwrap().done.last(), Some(&(8, 1)), "what has begun is waited for");
    assert!(began.elapsed() < Duration::from_secs(3));
}

/// A stream of what a service has: a receiver is a reply like any other. By hand: a task for each,
/// which has to end with the service.
#[tokio::test]
async fn a_stream_ends_with_its_service() {
    struct Feed {
        news: Vec<u32>,
    }

    #[tenorite::service]
    impl Feed {
        pub fn stream(&mut self, me: SelfCaller<FeedCaller>) -> Result<mpsc::Receiver<u32>, SendReason> {
            let (sender, receiver) = mpsc::channel(1);
            let news = self.news.clone();
            me.spawn_background(async move {
                for one in news {
                    if sender.send(one).await.is_err() {
                        return;
                    }
                }
                sender.closed().await;
            })?;
            Ok(receiver)
        }
    }

    let (task, feed) = FeedService.start_task(4, Feed { news: vec![1, 2, 3] });
    let mut stream = feed.stream().await.unwrap();
    for one in 1..=3 {
        assert_eq!(stream.recv().await, Some(one));
    }
    drop(feed);
    task.await.unwrap();
    assert_eq!(stream.recv().await, None);
}
