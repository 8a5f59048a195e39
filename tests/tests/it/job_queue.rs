//! The example of the guide's chapter on answering later, which is there to be copied.

use std::collections::VecDeque;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Reply};
use tenorite_tests::{poll_once, ready_now};

#[derive(Default)]
struct Queue {
    jobs: VecDeque<String>,
    waiting: VecDeque<Reply<String>>,
    /// So many may wait before those whose callers have hung up are looked for.
    limit: usize,
}

#[tenorite::service]
impl Queue {
    /// The next job, as soon as there is one. First come, first served.
    pub fn next(&mut self, reply: Reply<String>) {
        match self.jobs.pop_front() {
            Some(job) => {
                // The caller may have hung up since its request was sent: then the job is still the next.
                if let Err(job) = reply.send(job) {
                    self.jobs.push_front(job);
                }
            }
            None => {
                if self.waiting.len() >= self.limit {
                    self.waiting.retain(|reply| !reply.is_closed());
                    // Twice what is left, so that a look at all of them is paid for by as many calls.
                    self.limit = 2 * self.waiting.len() + 16;
                }
                self.waiting.push_back(reply);
            }
        }
    }

    pub fn add(&mut self, mut job: String) {
        while let Some(reply) = self.waiting.pop_front() {
            match reply.send(job) {
                Ok(()) => return,
                Err(undelivered) => job = undelivered,
            }
        }
        self.jobs.push_back(job);
    }

    /// Side by side with others like it.
    pub fn fetch(&self, url: String, reply: Reply<usize>) {
        reply.spawn(async move { url.len() });
    }
}

const SOON: Duration = Duration::from_millis(10);
const LATE: TenoriteError = TenoriteError::FetchFailure(FetchReason::Expired);

/// How many jobs, and how many replies, a queue holds once its callers are gone.
async fn left(task: tokio::task::JoinHandle<Queue>, queue: QueueCaller) -> (usize, usize) {
    queue.stop();
    let Queue { jobs, waiting, .. } = task.await.unwrap();
    (jobs.len(), waiting.len())
}

/// Without white space, which the guide has less of.
fn packed(source: &str) -> String {
    source.split_whitespace().collect()
}

#[test]
fn the_guide_has_the_code_that_is_tested_here() {
    let (guide, tested) = (include_str!("../../../docs/services.md"), include_str!("job_queue.rs"));
    let begin = guide.find("#[derive(Default)]\nstruct Queue").expect("the example");
    let end = begin + guide[begin..].find("\n}\n\n# #[tokio::main").expect("the end of its worker");
    assert!(packed(tested).contains(&packed(&guide[begin..end])), "{}", &guide[begin..end]);
}

#[tokio::test(start_paused = true)]
async fn a_job_is_not_lost_with_a_caller_whose_time_is_up() {
    for inline in tenorite::testing::each_way() {
        let (_task, queue) = QueueService.builder().inline(inline).start_task(32, Queue::default());
        assert_eq!(queue.next().timeout(SOON).await, Err(LATE));
        queue.add("sweep").await.unwrap();
        assert_eq!(queue.next().await.unwrap(), "sweep", "{inline:?}");

        // Nor with one that was dropped, and those behind it get the job.
        let mut dropped = queue.next();
        assert!(poll_once(&mut dropped).is_pending());
        let mut late = queue.next().timeout(SOON);
        assert!(poll_once(&mut late).is_pending());
        let mut patient = queue.next();
        assert!(poll_once(&mut patient).is_pending());
        drop(dropped);
        assert_eq!(late.await, Err(LATE));
        queue.add("mop").await.unwrap();
        assert_eq!(patient.await.unwrap(), "mop", "{inline:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_and_callers_are_served_first_come_first_served() {
    for inline in tenorite::testing::each_way() {
        let (task, queue) = QueueService.builder().inline(inline).start_task(32, Queue::default());
        for job in ["one", "two", "three"] {
            queue.add(job).await.unwrap();
        }
        for job in ["one", "two"] {
            assert_eq!(queue.next().await.unwrap(), job, "{inline:?}");
        }
        queue.add("four").await.unwrap();
        for job in ["three", "four"] {
            assert_eq!(queue.next().await.unwrap(), job, "{inline:?}");
        }

        let mut waiting: Vec<_> = (0..3).map(|_| queue.next()).collect();
        for call in &mut waiting {
            assert!(poll_once(call).is_pending());
        }
        for job in ["five", "six", "seven", "eight"] {
            queue.add(job).await.unwrap();
        }
        for (call, job) in waiting.iter_mut().zip(["five", "six", "seven"]) {
            assert_eq!(ready_now(call).unwrap(), job, "{inline:?}");
        }
        drop(waiting);
        assert_eq!(left(task, queue).await, (1, 0), "{inline:?}");
    }
}

/// The worker hears only as it answers that the caller has hung up.
#[tokio::test]
async fn a_job_that_nobody_takes_stays_the_next() {
    let (caller, receiver) = Reply::channel();
    drop(receiver);
    let mut queue = Queue::default();
    queue.add("one".to_owned());
    queue.add("two".to_owned());
    queue.next(caller);
    let (caller, job) = Reply::channel();
    queue.next(caller);
    assert_eq!(job.await.unwrap(), "one");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_callers_whose_time_is_up_leave_nothing() {
    for inline in tenorite::testing::each_way() {
        // One after the other, behind one that goes on waiting. Nobody ever adds a job.
        let (task, queue) = QueueService.builder().inline(inline).start_task(32, Queue::default());
        let mut patient = queue.next();
        assert!(poll_once(&mut patient).is_pending());
        for _ in 0..10_000 {
            assert_eq!(queue.next().timeout(Duration::from_millis(1)).await, Err(LATE));
        }
        drop(patient);
        let (jobs, waiting) = left(task, queue).await;
        assert!(jobs == 0 && waiting <= 2 + 16, "{inline:?}: {waiting}");

        // All at once.
        let (task, queue) = QueueService.builder().inline(inline).start_task(20_000, Queue::default());
        let mut expiring: Vec<_> = (0..10_000).map(|_| queue.next().timeout(SOON)).collect();
        for call in &mut expiring {
            assert!(poll_once(call).is_pending());
        }
        for call in expiring {
            assert_eq!(call.await, Err(LATE), "{inline:?}");
        }
        queue.add("sweep").await.unwrap();
        assert_eq!(queue.next().await.unwrap(), "sweep", "{inline:?}");
        assert_eq!(left(task, queue).await, (0, 0), "{inline:?}");
    }
}

#[tokio::test]
async fn an_answer_may_come_from_a_task_of_its_own() {
    let (_task, queue) = QueueService.start_task(32, Queue::default());
    let (job, added, fetched) = tokio::join!(queue.next(), queue.add("sweep"), queue.fetch("example.org"));
    assert_eq!((job.unwrap(), added, fetched), ("sweep".to_owned(), Ok(()), Ok(11)));
}
