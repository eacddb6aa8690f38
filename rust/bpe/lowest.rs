//! The lowest of many numbers that change, the leftmost of equals.

#![allow(clippy::inline_always)] // compiled into the caller, once for each set of instructions

/// How many numbers one number above them stands for: one or two registers of the processor.
const FAN: usize = 16;
/// Larger than every rank; room for the number of a lane is left above it.
pub(crate) const NO_RANK: u32 = u32::MAX >> 5;

/// Ranks by position, above each [`FAN`] of them the lowest, and so on up to one group.
///
/// Same as looking at all of them; a change costs one group a level at most, mostly one alone.
#[derive(Debug, Default)]
pub(crate) struct Lowest {
    levels: Vec<Vec<[u32; FAN]>>,
}

#[inline(always)]
fn least(group: &[u32; FAN]) -> u32 {
    group.iter().fold(NO_RANK, |least, &rank| least.min(rank))
}

impl Lowest {
    /// Takes the ranks of the positions from 0 on.
    #[inline(always)]
    pub(crate) fn fill(&mut self, ranks: impl ExactSizeIterator<Item = u32>) {
        self.levels.iter_mut().for_each(Vec::clear);
        let mut groups = ranks.len().div_ceil(FAN).max(1);
        let mut level = 0;
        self.fill_level(0, groups, ranks);
        while groups > 1 {
            let below = std::mem::take(&mut self.levels[level]);
            level += 1;
            groups = groups.div_ceil(FAN);
            self.fill_level(level, groups, below.iter().map(least));
            self.levels[level - 1] = below;
        }
        self.levels.truncate(level + 1);
    }

    #[inline(always)]
    fn fill_level(&mut self, level: usize, groups: usize, ranks: impl Iterator<Item = u32>) {
        if self.levels.len() <= level {
            self.levels.push(Vec::new());
        }
        let there = &mut self.levels[level];
        there.resize(groups, [NO_RANK; FAN]);
        for (place, rank) in there.as_flattened_mut().iter_mut().zip(ranks) {
            *place = rank;
        }
    }

    /// The lowest rank and its leftmost position; `NO_RANK` if none is left.
    #[inline(always)]
    pub(crate) fn first(&self) -> (u32, usize) {
        let (mut group, mut rank) = (0, NO_RANK);
        for level in self.levels.iter().rev() {
            let mut best = u32::MAX;
            for (&rank, lane) in level[group].iter().zip(0u32..) {
                best = best.min(rank << 4 | lane);
            }
            rank = best >> 4;
            group = group * FAN + (best & 15) as usize;
        }
        (rank, group)
    }

    /// Gives a position another rank.
    #[inline(always)]
    pub(crate) fn set(&mut self, mut position: usize, mut rank: u32) {
        for level in &mut self.levels {
            let group = &mut level[position / FAN];
            let before = std::mem::replace(&mut group[position % FAN], rank);
            if before == rank {
                return;
            }
            position /= FAN;
            rank = least(group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_looking_at_all_of_them(
            mut ranks in proptest::collection::vec(0u32..50, 1..5000),
            changes in proptest::collection::vec((any::<usize>(), prop_oneof![0u32..50, Just(NO_RANK)]), 0..200),
        ) {
            let mut lowest = Lowest::default();
            lowest.fill([1, 2, 3].into_iter());
            lowest.fill(ranks.iter().copied());
            for (at, rank) in changes {
                let at = at % ranks.len();
                ranks[at] = rank;
                lowest.set(at, rank);
                let least = ranks.iter().copied().min().unwrap();
                let (found, position) = lowest.first();
                prop_assert_eq!(found, least);
                if least != NO_RANK {
                    prop_assert_eq!(Some(position), ranks.iter().position(|&rank| rank == least));
                }
            }
        }
    }
}
