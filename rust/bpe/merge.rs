//! Merging the bytes of one word into tokens: always the pair of the lowest rank, the leftmost of equals.
//!
//! Same as: look at all neighbouring pairs, merge the best one, start again. Short words do just that, with the ranks in
//! a few registers of the processor; for longer ones [`Lowest`] knows the best pair; very long ones go rank by rank
//! (`sweep`), so that 10 MB of one letter cost linear work.

#![allow(clippy::inline_always)] // compiled into the caller, once for each set of instructions

use multiversion::multiversion;

use super::lowest::{Lowest, NO_RANK};
use super::ranks::{Merges, NONE};
use super::sweep::{self, SweepScratch};

/// Words up to this many bytes have one bit a byte in a register.
const SHORT: usize = 64;
const SHORTER: usize = 16;
/// From here on a search for the lowest rank waits for memory more than it works.
const LONG: usize = 1 << 12;
/// A longer word gives its memory back.
const KEPT: usize = 1 << 16;

/// One token of a long word in work, at the position of its first byte.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    /// Past the last position at the end.
    next: u32,
    /// `u32::MAX` at the beginning.
    previous: u32,
}

/// Reused memory of [`Merges::encode`].
#[derive(Debug, Default)]
pub(crate) struct MergeScratch {
    symbols: Vec<Symbol>,
    lowest: Lowest,
    sweep: SweepScratch,
}

impl Merges {
    /// Appends the tokens of `word` to `out`.
    pub(crate) fn encode(&self, word: &[u8], scratch: &mut MergeScratch, out: &mut Vec<i32>) {
        if word.len() <= SHORTER {
            encode_shorter(self, word, out);
        } else if word.len() <= SHORT {
            encode_short(self, word, out);
        } else if word.len() <= LONG {
            encode_long(self, word, scratch, out);
        } else {
            sweep::encode(self, word, &mut scratch.sweep, out);
            if word.len() > KEPT {
                *scratch = MergeScratch::default();
            }
        }
    }

    /// A word of at most `N` bytes. A pair is its rank and below it its position, which is why the least is the best.
    #[inline(always)]
    fn encode_in<const N: usize>(&self, word: &[u8], out: &mut Vec<i32>) {
        const NO_PAIR: u32 = u32::MAX >> 1;
        let pair = |rank: u32, at: usize| {
            if rank == NONE { NO_PAIR } else { rank << SHORT.trailing_zeros() | at as u32 }
        };
        let mut ids = [0; N];
        let mut pairs = [NO_PAIR; N];
        let n = word.len().min(N);
        for (id, &byte) in ids.iter_mut().zip(word) {
            *id = self.byte_id(byte);
        }
        for (at, (place, two)) in pairs.iter_mut().zip(word.windows(2)).enumerate() {
            *place = pair(self.byte_rank(two[0], two[1]), at);
        }
        // The positions where a token begins.
        let mut begins = u64::MAX.checked_shr(u64::BITS - n as u32).unwrap_or(0);
        let groups = n.div_ceil(SHORTER);
        loop {
            let mut best = NO_PAIR;
            for group in pairs.as_chunks::<SHORTER>().0.iter().take(groups) {
                for &pair in group {
                    best = best.min(pair);
                }
            }
            if best == NO_PAIR {
                break;
            }
            let at = best as usize % SHORT % N;
            let behind = begins & (u64::MAX << at) << 1;
            let right = behind.trailing_zeros() as usize % N;
            let id = self.made(best >> SHORT.trailing_zeros());
            ids[at] = id;
            pairs[right] = NO_PAIR;
            begins &= !(1 << right);
            let behind = behind & behind.wrapping_sub(1);
            pairs[at] = match behind {
                0 => NO_PAIR,
                _ => pair(self.rank(id, ids[behind.trailing_zeros() as usize % N]), at),
            };
            let before = begins & ((1 << at) - 1);
            if before != 0 {
                let left = before.ilog2() as usize % N;
                pairs[left] = pair(self.rank(ids[left], id), left);
            }
        }
        while begins != 0 {
            out.push(ids[begins.trailing_zeros() as usize % N] as i32);
            begins &= begins - 1;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn encode_shorter(merges: &Merges, word: &[u8], out: &mut Vec<i32>) {
    merges.encode_in::<SHORTER>(word, out);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn encode_short(merges: &Merges, word: &[u8], out: &mut Vec<i32>) {
    merges.encode_in::<SHORT>(word, out);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn encode_long(merges: &Merges, word: &[u8], scratch: &mut MergeScratch, out: &mut Vec<i32>) {
    let MergeScratch { symbols, lowest, .. } = scratch;
    let known = |rank: u32| if rank == NONE { NO_RANK } else { rank };
    symbols.clear();
    symbols.extend(word.iter().zip(0u32..).map(|(&byte, i)| Symbol {
        id: merges.byte_id(byte),
        next: i + 1,
        previous: i.wrapping_sub(1),
    }));
    lowest.fill(word.windows(2).map(|two| known(merges.byte_rank(two[0], two[1]))));
    loop {
        let (rank, at) = lowest.first();
        if rank == NO_RANK {
            break;
        }
        let id = merges.made(rank);
        let Symbol { next: right, previous, .. } = symbols[at];
        let next = symbols[right as usize].next;
        symbols[at] = Symbol { id, next, previous };
        if (right as usize) < word.len() - 1 {
            lowest.set(right as usize, NO_RANK);
        }
        let with_next = match symbols.get_mut(next as usize) {
            None => NO_RANK,
            Some(after) => {
                after.previous = at as u32;
                known(merges.rank(id, after.id))
            }
        };
        lowest.set(at, with_next);
        if let Some(before) = symbols.get(previous as usize) {
            lowest.set(previous as usize, known(merges.rank(before.id, id)));
        }
    }
    let mut i = 0;
    while let Some(symbol) = symbols.get(i as usize) {
        out.push(symbol.id as i32);
        i = symbol.next;
    }
}

#[cfg(test)]
pub(crate) use tests::random_merges;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the lowest rank, leftmost, again and again.
    fn naive(merges: &[(u32, u32, u32)], word: &[u8]) -> Vec<i32> {
        let mut ids: Vec<u32> = word.iter().map(|&b| u32::from(b)).collect();
        let rank = |a: u32, b: u32| merges.iter().rposition(|m| (m.0, m.1) == (a, b));
        while let Some((rank, at)) =
            (1..ids.len()).filter_map(|i| Some((rank(ids[i - 1], ids[i])?, i - 1))).min()
        {
            ids[at] = merges[rank].2;
            ids.remove(at + 1);
        }
        ids.iter().map(|&id| id as i32).collect()
    }

    /// Merges over `a`..`d` whose ranks are shuffled, so that later merges can outrank earlier ones.
    pub(crate) fn random_merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
        (proptest::collection::vec((any::<u32>(), any::<u32>()), 1..40), any::<u64>()).prop_map(
            |(pairs, seed)| {
                let mut tokens: Vec<String> = ('a'..='d').map(String::from).collect();
                let mut ids: Vec<u32> = (97..101).collect();
                let mut out = Vec::new();
                for (a, b) in pairs {
                    let (a, b) = (a as usize % tokens.len(), b as usize % tokens.len());
                    let joined = format!("{}{}", tokens[a], tokens[b]);
                    if joined.len() > 12
                        || out.iter().any(|m: &(u32, u32, u32)| (m.0, m.1) == (ids[a], ids[b]))
                    {
                        continue;
                    }
                    let known = tokens.iter().position(|t| *t == joined);
                    let place = known.unwrap_or(tokens.len());
                    if known.is_none() {
                        tokens.push(joined);
                        ids.push(300 + place as u32);
                    }
                    let id = ids[place];
                    out.push((ids[a], ids[b], id));
                }
                let mut state = seed | 1;
                for i in (1..out.len()).rev() {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    out.swap(i, (state >> 33) as usize % (i + 1));
                }
                out
            },
        )
    }

    proptest! {
        #[test]
        fn all_ways_equal_the_definition(merges in random_merges(), word in "[a-d]{0,64}", long in "([a-d]{1,6}){1,80}") {
            let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
            let mut scratch = MergeScratch::default();
            for word in [word.as_bytes(), long.as_bytes()] {
                let expected = naive(&merges, word);
                let mut out = Vec::new();
                table.encode(word, &mut scratch, &mut out);
                prop_assert_eq!(&out, &expected);
                if word.len() <= SHORT {
                    let mut out = Vec::new();
                    encode_short(&table, word, &mut out);
                    prop_assert_eq!(&out, &expected);
                }
                if !word.is_empty() {
                    let (mut out, mut swept) = (Vec::new(), Vec::new());
                    encode_long(&table, word, &mut scratch, &mut out);
                    prop_assert_eq!(&out, &expected);
                    sweep::encode(&table, word, &mut scratch.sweep, &mut swept);
                    prop_assert_eq!(&swept, &expected);
                }
            }
        }

        #[test]
        fn runs_of_one_letter_equal_the_definition(n in 0usize..200) {
            let merges = [(97, 97, 300), (300, 300, 301), (301, 97, 302), (302, 302, 303), (300, 97, 304)];
            let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
            let word = vec![b'a'; n];
            let (mut out, mut swept) = (Vec::new(), Vec::new());
            table.encode(&word, &mut MergeScratch::default(), &mut out);
            sweep::encode(&table, &word, &mut SweepScratch::default(), &mut swept);
            prop_assert_eq!(&out, &swept);
            prop_assert_eq!(out, naive(&merges, &word));
        }
    }
}
