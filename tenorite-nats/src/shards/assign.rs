//! Assigns shards to members, by a rule that every member computes alike from nothing but the
//! members.
//!
//! The rule is bounded-load rendezvous hashing (Thaler and Ravishankar 1998; bounded loads after
//! Mirrokni, Thorup and Zadimoghaddam 2018). Each pair of shard and member has a score. The pairs
//! are visited from the highest score down. A pair is taken if its shard has no owner yet and its
//! member has capacity.
//!
//! # Invariants
//!
//! - A1: A member's share is `shards * weight / all weights`. It owns that many shards, rounded
//!   down or up.
//! - A2: Each shard has a *first* member, which owns it. With more than one member it also has a
//!   *second*: the member that becomes its first if the first leaves. So when a member leaves, each
//!   of its shards goes to its standby.
//! - A3: The outcome does not depend on the order in which the members are given.

/// The largest weight. Each unit costs one more score per shard.
pub(super) const LARGEST_WEIGHT: u32 = 256;

/// One process that owns shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    pub(super) id: u64,
    /// From 1 to [`LARGEST_WEIGHT`].
    pub(super) weight: u32,
}

/// The ids of the members that are to own a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owners {
    pub(super) first: u64,
    pub(super) second: Option<u64>,
}

/// Returns the owners of each shard. There must be at least one member.
pub(super) fn assign(members: &[Member], shards: u32) -> Vec<Owners> {
    let mut members = members.to_vec();
    members.sort_unstable();
    members.dedup_by_key(|member| member.id);
    let mut pairs: Vec<(u64, u32, usize)> = (0..shards)
        .flat_map(|shard| members.iter().enumerate().map(move |(at, member)| (shard, at, *member)))
        .map(|(shard, at, member)| (score(shard, member), shard, at))
        .collect();
    // The rest of the pair breaks ties the same way everywhere: members are sorted by their ids.
    pairs.sort_unstable_by(|a, b| b.cmp(a));
    let firsts = go_through(&pairs, &members, None, shards);
    let mut owners: Vec<_> =
        firsts.iter().map(|at| Owners { first: members[*at].id, second: None }).collect();
    if members.len() > 1 {
        for without in 0..members.len() {
            let seconds = go_through(&pairs, &members, Some(without), shards);
            for shard in (0..shards as usize).filter(|shard| firsts[*shard] == without) {
                owners[shard].second = Some(members[seconds[shard]].id);
            }
        }
    }
    owners
}

/// Returns the index of each shard's member, leaving out the member `without`.
fn go_through(
    pairs: &[(u64, u32, usize)],
    members: &[Member],
    without: Option<usize>,
    shards: u32,
) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    let is_in = |at: &usize| Some(*at) != without;
    let all: u64 = (0..members.len()).filter(is_in).map(|at| u64::from(members[at].weight)).sum();
    // A1: each gets its share rounded down, and some get one more until all shards have an owner.
    let mut room: Vec<u64> = members
        .iter()
        .enumerate()
        .map(|(at, member)| if is_in(&at) { u64::from(shards) * u64::from(member.weight) / all } else { 0 })
        .collect();
    let mut more = u64::from(shards) - room.iter().sum::<u64>();
    let mut has_more = vec![false; members.len()];
    let mut owners = vec![NONE; shards as usize];
    for (_, shard, at) in pairs {
        if owners[*shard as usize] != NONE || !is_in(at) {
            continue;
        }
        if room[*at] > 0 {
            room[*at] -= 1;
        } else if more > 0 && !has_more[*at] {
            more -= 1;
            has_more[*at] = true;
        } else {
            continue;
        }
        owners[*shard as usize] = *at;
    }
    owners
}

/// Returns the highest of as many scores as the member has weight. This is weighted rendezvous
/// hashing in integers, which are the same on every machine.
fn score(shard: u32, member: Member) -> u64 {
    (0..member.weight.clamp(1, LARGEST_WEIGHT))
        .map(|unit| mix(member.id ^ mix(u64::from(shard) << 32 | u64::from(unit))))
        .max()
        .unwrap_or_default()
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn members(count: u64, salt: u64) -> Vec<Member> {
        (0..count).map(|at| Member { id: mix(at << 32 | salt), weight: 1 }).collect()
    }

    fn loads(owners: &[Owners]) -> BTreeMap<u64, u32> {
        let mut loads = BTreeMap::new();
        owners.iter().for_each(|owners| *loads.entry(owners.first).or_default() += 1);
        loads
    }

    #[test]
    fn everybody_has_its_share_rounded_down_or_up() {
        for salt in 0..5 {
            for count in 1..=10 {
                for shards in [1, 2, 3, 7, 16, 100, 1000] {
                    let members = members(count, salt);
                    let owners = assign(&members, shards);
                    let loads = loads(&owners);
                    let (least, most) = (shards / count as u32, shards.div_ceil(count as u32));
                    for member in &members {
                        let load = loads.get(&member.id).copied().unwrap_or_default();
                        assert!((least..=most).contains(&load), "{load} of {shards} shards among {count}");
                    }
                    let seconds = owners.iter().filter(|owners| owners.second.is_some()).count();
                    assert_eq!(seconds, if count > 1 { shards as usize } else { 0 });
                    assert!(owners.iter().all(|owners| owners.second != Some(owners.first)));
                }
            }
        }
    }

    #[test]
    fn the_order_of_members_does_not_matter() {
        let mut members = members(7, 1);
        let owners = assign(&members, 64);
        members.reverse();
        members.swap(1, 4);
        assert_eq!(assign(&members, 64), owners);
    }

    /// The standby of a member that leaves is already in place.
    #[test]
    fn the_second_is_the_first_of_those_who_remain() {
        let members = members(6, 2);
        let owners = assign(&members, 100);
        for gone in &members {
            let remaining: Vec<_> = members.iter().filter(|member| *member != gone).copied().collect();
            let after = assign(&remaining, 100);
            for (before, after) in owners.iter().zip(after) {
                if before.first == gone.id {
                    assert_eq!(before.second, Some(after.first));
                }
            }
        }
    }

    #[test]
    fn few_shards_move_when_a_member_joins() {
        for salt in 0..20 {
            for count in 1..10_u32 {
                let shards = 100;
                let after = members(u64::from(count) + 1, salt);
                let before = &after[..count as usize];
                let moved = assign(before, shards)
                    .iter()
                    .zip(assign(&after, shards))
                    .filter(|(before, after)| before.first != after.first)
                    .count();
                let least = shards / (count + 1);
                assert!(
                    moved as u32 <= 2 * least + 4,
                    "{moved} of {shards} moved to {count} + 1, {least} had to"
                );
            }
        }
    }

    #[test]
    fn weights_are_kept_to() {
        let mut members = members(3, 3);
        members[0].weight = 2;
        let owners = assign(&members, 100);
        let loads = loads(&owners);
        assert_eq!(loads[&members[0].id], 50);
        assert_eq!(loads[&members[1].id], 25);
    }
}
