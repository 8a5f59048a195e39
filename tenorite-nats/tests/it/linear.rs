//! Whether a history of calls is linearizable: whether each call seems to have its effect at one moment
//! between its start and its end.
//!
//! The model is a list that entries are appended to. Each append answers with how many there are then, each
//! read with all of them. So every answer names the version of the list that its call has seen, and the
//! search of Wing and Gong (1993) is not needed: a history is linearizable if and only if versions never go
//! back from a call that has ended to one that begins later.

use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What a call has seen.
#[derive(Debug, Clone)]
pub enum Seen {
    /// It has appended this entry, and the list had so many then.
    Appended(u32, usize),
    /// It was told nothing, and its entry may be there.
    Unknown(u32),
    /// It did not run.
    Refused(u32),
    Read(Vec<u32>),
}

#[derive(Debug, Clone)]
pub struct Op {
    pub began: Instant,
    pub ended: Instant,
    pub seen: Seen,
}

#[derive(Debug, Clone, Default)]
pub struct History(Arc<Mutex<Vec<Op>>>);

impl History {
    pub fn add(&self, began: Instant, seen: Seen) {
        self.0.lock().unwrap().push(Op { began, ended: Instant::now(), seen });
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// # Panics
    ///
    /// If it is not linearizable, with the calls that show it.
    pub fn check(&self, there: &[u32]) {
        if let Err(why) = check(&self.0.lock().unwrap(), there) {
            panic!("{why}");
        }
    }
}

/// `there` is the list at the end.
pub fn check(ops: &[Op], there: &[u32]) -> Result<(), String> {
    let mut sorted = there.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("{} is there twice: {there:?}", twice[0]));
    }
    // The version that each has seen, and whether it made it.
    let mut versions = Vec::new();
    for op in ops {
        match &op.seen {
            Seen::Appended(entry, count) => {
                if there.get(count - 1) != Some(entry) {
                    return Err(format!("{entry} was acknowledged as the {count}th, and is not: {there:?}"));
                }
                versions.push((op, *count, true));
            }
            Seen::Read(entries) => {
                if !there.starts_with(entries) {
                    return Err(format!("{entries:?} were read, and are no beginning of {there:?}"));
                }
                versions.push((op, entries.len(), false));
            }
            Seen::Refused(entry) if there.contains(entry) => {
                return Err(format!("{entry} is there, and was said not to have run"));
            }
            Seen::Refused(_) => {}
            Seen::Unknown(entry) => {
                // It had its effect after it began. When it ended nobody knows.
                if let Some(at) = there.iter().position(|there| there == entry) {
                    let late = ops.iter().find(|other| {
                        let version = match &other.seen {
                            Seen::Appended(_, count) => *count,
                            Seen::Read(entries) => entries.len(),
                            _ => 0,
                        };
                        other.ended < op.began && version > at
                    });
                    if let Some(late) = late {
                        return Err(format!("{late:?} has seen what began later: {op:?}"));
                    }
                }
            }
        }
    }
    for (earlier, before, _) in &versions {
        for (later, after, makes) in &versions {
            let goes_back = if *makes { after <= before } else { after < before };
            if earlier.ended < later.began && goes_back {
                return Err(format!(
                    "a call that began {:?} after another had ended has not seen it: version {after}, and {before} before",
                    later.began - earlier.ended
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn op(start: Instant, began: u64, ended: u64, seen: Seen) -> Op {
        let at = |ms| start + Duration::from_millis(ms);
        Op { began: at(began), ended: at(ended), seen }
    }

    #[test]
    fn what_is_linearizable_passes_and_what_is_not_does_not() {
        let start = Instant::now();
        let append = |began, ended, entry, count| op(start, began, ended, Seen::Appended(entry, count));
        let read = |began, ended, entries: &[u32]| op(start, began, ended, Seen::Read(entries.to_vec()));
        let good = [append(0, 10, 7, 1), read(5, 20, &[]), read(15, 30, &[7]), append(12, 40, 8, 2)];
        assert_eq!(check(&good, &[7, 8]), Ok(()));
        let stale = [append(0, 10, 7, 1), read(11, 20, &[])];
        assert!(check(&stale, &[7]).unwrap_err().contains("has not seen it"));
        let backwards = [read(0, 10, &[7]), read(11, 20, &[])];
        assert!(check(&backwards, &[7]).is_err());
        assert!(check(&[append(0, 10, 7, 1)], &[]).is_err());
        assert!(check(&[append(0, 10, 7, 2)], &[7, 7]).unwrap_err().contains("twice"));
        assert!(check(&[append(0, 10, 7, 1)], &[8]).is_err());
        assert!(check(&[op(start, 0, 1, Seen::Refused(7))], &[7]).is_err());
        let early = [read(0, 10, &[7]), op(start, 20, 30, Seen::Unknown(7))];
        assert!(check(&early, &[7]).is_err());
        assert_eq!(check(&[op(start, 0, 1, Seen::Unknown(7)), read(2, 3, &[7])], &[7]), Ok(()));
    }
}
