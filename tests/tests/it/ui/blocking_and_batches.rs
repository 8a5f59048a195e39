//! How requests may be served, and which ways exclude each other.

use tenorite::prelude::*;

struct Blocking;

#[tenorite::service]
impl Blocking {
    #[service(blocking)]
    pub async fn waits(&mut self) {}

    #[service(blocking)]
    pub fn answers_later(&mut self, reply: Reply<u8>) {
        drop(reply);
    }

    #[service(blocking = 4)]
    pub fn with_a_value(&mut self) {}

    #[service(blocking)]
    fn private(&mut self) {}

    #[service(every = "1s", blocking)]
    fn tick(&mut self) {}
}

struct Batches;

#[tenorite::service]
impl Batches {
    #[service(batch)]
    pub fn of_how_many(&mut self, lines: Vec<u8>) -> Vec<u8> {
        lines
    }

    #[service(batch = 0)]
    pub fn of_none(&mut self, lines: Vec<u8>) -> Vec<u8> {
        lines
    }

    #[service(batch = 4)]
    pub fn of_nothing(&mut self) -> Vec<u8> {
        Vec::new()
    }

    #[service(batch = 4)]
    pub fn of_a_slice(&mut self, lines: &[u8]) -> Vec<u8> {
        lines.to_vec()
    }

    #[service(batch = 4)]
    pub fn of_what_borrows(&mut self, lines: Vec<&str>) -> Vec<usize> {
        lines.iter().map(|line| line.len()).collect()
    }

    #[service(batch = 4)]
    pub fn of_callers(&mut self, me: Vec<SelfCaller<BatchesCaller>>) -> Vec<u8> {
        vec![0; me.len()]
    }

    #[service(batch = 4)]
    pub fn of_no_worker(lines: Vec<u8>) -> Vec<u8> {
        lines
    }

    #[service(batch = 4)]
    pub fn of_two(&mut self, lines: Vec<u8>, more: Vec<u8>) -> Vec<u8> {
        [lines, more].concat()
    }

    #[service(batch = 4)]
    pub fn with_one_answer(&mut self, lines: Vec<u8>) -> usize {
        lines.len()
    }

    #[service(batch = 4)]
    pub fn without_answers(&mut self, lines: Vec<u8>) {
        drop(lines);
    }

    #[service(batch = 4)]
    pub fn with_a_reply(&mut self, lines: Vec<u8>, reply: Reply<u8>) {
        drop((lines, reply));
    }
}

struct Shards;

#[tenorite::service]
impl Shards {
    #[service(batch = 4, all_shards = merge)]
    pub fn of_all_shards(&mut self, lines: Vec<u8>) -> Vec<u8> {
        lines
    }
}

fn main() {}
