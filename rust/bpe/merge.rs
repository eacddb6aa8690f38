//! Merging the bytes of one word into tokens: always the pair of the lowest rank, the leftmost of equals.
//!
//! Same as: look at all neighbouring pairs, merge the best one, start again. Short words do that with the ranks kept in
//! an array; long ones keep the positions of each rank in a list, so that 10 MB of one letter cost linear work.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No merge, no symbol, no position.
const NONE: u32 = u32::MAX;

/// Words up to this many bytes take the quadratic way, whose constant is small.
const SHORT: usize = 48;

/// The merges of one model: (left, right) -> (rank, new id), by open addressing.
#[derive(Debug)]
pub(crate) struct Merges {
    /// Token of every single byte.
    byte_ids: [u32; 256],
    /// Rank of the merge of every two bytes: every word begins with these, and the table stays in the cache.
    byte_ranks: Vec<u32>,
    slots: Vec<Slot>,
    shift: u32,
    /// New id of each rank.
    result: Vec<u32>,
    /// Whether every merge that uses the new token has a higher rank, so that no urgent work can follow.
    calm: Vec<bool>,
}

/// One place of the table: a key and its value on one line of the processor's cache.
#[derive(Debug, Clone, Copy)]
struct Slot {
    key: u64,
    rank: u32,
}

/// One token of a long word in work, at the position of its first byte.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    /// Rank of the pair with the next symbol; `NONE` if none, and once merged into the symbol to the left.
    rank: u32,
    next: u32,
    previous: u32,
}

/// Reused memory of [`Merges::encode`].
#[derive(Debug, Default)]
pub(crate) struct MergeScratch {
    symbols: Vec<Symbol>,
    bucket_of: Vec<u32>,
    buckets: Vec<Vec<u32>>,
    free: Vec<u32>,
}

impl Merges {
    /// `merges` holds (left, right, new id) in the order of their ranks; of two with the same pair the later one counts.
    pub(crate) fn new(byte_ids: &[u32; 256], merges: &[(u32, u32, u32)]) -> Self {
        let size = (merges.len() * 2).next_power_of_two().max(16);
        let mut table = Self {
            byte_ids: *byte_ids,
            byte_ranks: Vec::new(),
            slots: vec![Slot { key: u64::MAX, rank: NONE }; size],
            shift: u64::BITS - size.trailing_zeros(),
            result: merges.iter().map(|m| m.2).collect(),
            calm: Vec::new(),
        };
        let ids = merges.iter().map(|m| m.0.max(m.1).max(m.2) as usize + 1).max().unwrap_or(0);
        let mut first_use = vec![NONE; ids];
        for (rank, &(left, right, _)) in merges.iter().enumerate().rev() {
            first_use[left as usize] = rank as u32;
            first_use[right as usize] = rank as u32;
        }
        let is_calm = |(merge, rank): (&(u32, u32, u32), u32)| first_use[merge.2 as usize] > rank;
        table.calm = merges.iter().zip(0u32..).map(is_calm).collect();
        for (rank, &(left, right, _)) in merges.iter().enumerate() {
            let slot = table.slot(left, right);
            table.slots[slot] = Slot { key: key(left, right), rank: rank as u32 };
        }
        let pairs = byte_ids.iter().flat_map(|&left| byte_ids.map(|right| (left, right)));
        table.byte_ranks = pairs.map(|(left, right)| table.rank(left, right)).collect();
        table
    }

    /// Where the pair is, or the free place where it would be.
    #[inline]
    fn slot(&self, left: u32, right: u32) -> usize {
        let key = key(left, right);
        let mask = self.slots.len() - 1;
        let mut slot = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize & mask;
        while self.slots[slot].key != key && self.slots[slot].key != u64::MAX {
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// Rank of the merge of two tokens, `NONE` if there is none.
    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.slots[self.slot(left, right)].rank
    }

    /// Appends the tokens of `word` to `out`.
    pub(crate) fn encode(&self, word: &[u8], scratch: &mut MergeScratch, out: &mut Vec<i32>) {
        if word.len() <= SHORT {
            self.encode_short(word, out);
        } else {
            self.encode_long(word, scratch, out);
        }
    }

    fn encode_short(&self, word: &[u8], out: &mut Vec<i32>) {
        let mut ids = [0; SHORT];
        let mut ranks = [NONE; SHORT];
        let mut n = word.len();
        for (id, &byte) in ids.iter_mut().zip(word) {
            *id = self.byte_ids[byte as usize];
        }
        for (rank, two) in ranks.iter_mut().zip(word.windows(2)) {
            *rank = self.byte_ranks[usize::from(two[0]) << 8 | usize::from(two[1])];
        }
        while n > 1 {
            let (mut best, mut at) = (NONE, 0);
            for (i, &rank) in ranks[..n - 1].iter().enumerate() {
                if rank < best {
                    (best, at) = (rank, i);
                }
            }
            if best == NONE {
                break;
            }
            ids[at] = self.result[best as usize];
            ids.copy_within(at + 2..n, at + 1);
            ranks.copy_within(at + 1..n - 1, at);
            n -= 1;
            if at + 1 < n {
                ranks[at] = self.rank(ids[at], ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
        }
        out.extend(ids[..n].iter().map(|&id| id as i32));
    }

    /// The positions wait in one list per rank. Lists are taken from the lowest rank up; what appears at or below the
    /// rank that is being worked on goes through a heap, so the order is exact whatever the merges are. Lists are
    /// filled in the order of positions but for interleavings, so sorting them is nearly free: O(n log n) at worst,
    /// O(n) for what people write and for long runs of one character.
    fn encode_long(&self, word: &[u8], scratch: &mut MergeScratch, out: &mut Vec<i32>) {
        let mut work = Long::new(self, scratch, word);
        while let Some(Reverse(rank)) = work.active.pop() {
            let mut list = work.take(rank);
            if !list.is_sorted() {
                list.sort_unstable();
            }
            if self.calm[rank as usize] {
                work.merge_calmly(&mut list, rank);
            } else {
                work.merge_in_order(&list, rank);
            }
            work.give_back(rank, list);
        }
        let mut i = 0;
        while let Some(symbol) = work.symbols.get(i as usize) {
            out.push(symbol.id as i32);
            i = symbol.next;
        }
    }
}

#[inline]
fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// One long word in work: a linked list of symbols, and the positions by rank.
struct Long<'a> {
    merges: &'a Merges,
    symbols: &'a mut Vec<Symbol>,
    bucket_of: &'a mut Vec<u32>,
    buckets: &'a mut Vec<Vec<u32>>,
    free: &'a mut Vec<u32>,
    active: BinaryHeap<Reverse<u32>>,
    urgent: BinaryHeap<Reverse<(u32, u32)>>,
}

impl<'a> Long<'a> {
    fn new(merges: &'a Merges, scratch: &'a mut MergeScratch, word: &[u8]) -> Self {
        let MergeScratch { symbols, bucket_of, buckets, free } = scratch;
        symbols.clear();
        symbols.extend(word.iter().zip(0u32..).map(|(&byte, i)| Symbol {
            id: merges.byte_ids[byte as usize],
            rank: NONE,
            next: i + 1,
            previous: i.wrapping_sub(1),
        }));
        // A scratch may serve several models, so the size is set each time.
        bucket_of.clear();
        bucket_of.resize(merges.result.len(), NONE);
        let (active, urgent) = (BinaryHeap::new(), BinaryHeap::new());
        let mut this = Self { merges, symbols, bucket_of, buckets, free, active, urgent };
        let mut last = (NONE, NONE, NONE);
        for i in 1..word.len() {
            let (left, right) = (this.symbols[i - 1].id, this.symbols[i].id);
            if (left, right) != (last.0, last.1) {
                last = (left, right, merges.rank(left, right));
            }
            this.symbols[i - 1].rank = last.2;
            if last.2 != NONE {
                this.put(last.2, i as u32 - 1);
            }
        }
        this
    }

    /// Adds a position to the list of its rank.
    fn put(&mut self, rank: u32, position: u32) {
        let mut bucket = self.bucket_of[rank as usize];
        if bucket == NONE {
            bucket = self.free.pop().unwrap_or_else(|| {
                self.buckets.push(Vec::new());
                self.buckets.len() as u32 - 1
            });
            self.bucket_of[rank as usize] = bucket;
            self.active.push(Reverse(rank));
        }
        self.buckets[bucket as usize].push(position);
    }

    fn take(&mut self, rank: u32) -> Vec<u32> {
        std::mem::take(&mut self.buckets[self.bucket_of[rank as usize] as usize])
    }

    fn give_back(&mut self, rank: u32, mut list: Vec<u32>) {
        let bucket = std::mem::replace(&mut self.bucket_of[rank as usize], NONE);
        list.clear();
        list.shrink_to(1 << 16);
        self.buckets[bucket as usize] = list;
        self.free.push(bucket);
    }

    /// Merges the pairs at the positions of `list`, and whatever becomes urgent between them.
    fn merge_in_order(&mut self, list: &[u32], rank: u32) {
        let mut list = list.iter().copied().peekable();
        loop {
            let urgent = self.urgent.peek().map(|&Reverse(item)| item);
            let (item_rank, position) = match (urgent, list.peek()) {
                (Some(item), Some(&position)) if item < (rank, position) => item,
                (Some(item), None) => item,
                (_, Some(_)) => {
                    let Some(position) = list.next() else { return };
                    if self.join(position, rank) {
                        self.renew(position, rank);
                    }
                    continue;
                }
                (None, None) => return,
            };
            self.urgent.pop();
            if self.join(position, item_rank) {
                self.renew(position, rank);
            }
        }
    }

    /// [`Self::merge_in_order`] where nothing can become urgent: all merges first, then the new pairs, each once.
    fn merge_calmly(&mut self, list: &mut Vec<u32>, rank: u32) {
        list.retain(|&position| self.join(position, rank));
        let mut last = NONE;
        for &position in &*list {
            let before = self.symbols[position as usize].previous;
            if before != NONE && before != last {
                self.renew_right(before, rank);
            }
            self.renew_right(position, rank);
            last = position;
        }
    }

    /// Merges the pair at `position` if its rank is still `rank`. The new symbol has no rank yet.
    #[inline]
    fn join(&mut self, position: u32, rank: u32) -> bool {
        let left = self.symbols[position as usize];
        // The span of a pair only grows, so the same rank at the same place is the same pair.
        if left.rank != rank {
            return false;
        }
        let right = &mut self.symbols[left.next as usize];
        right.rank = NONE;
        let next = right.next;
        if let Some(after) = self.symbols.get_mut(next as usize) {
            after.previous = position;
        }
        let id = self.merges.result[rank as usize];
        self.symbols[position as usize] = Symbol { id, rank: NONE, next, ..left };
        true
    }

    /// Ranks of the pairs on both sides of a new symbol.
    fn renew(&mut self, position: u32, floor: u32) {
        let before = self.symbols[position as usize].previous;
        if before != NONE {
            self.renew_right(before, floor);
        }
        self.renew_right(position, floor);
    }

    /// Rank of the pair of the symbol at `position` with the next one. `floor` is the rank that is being worked on.
    #[inline]
    fn renew_right(&mut self, position: u32, floor: u32) {
        let left = self.symbols[position as usize];
        let rank = match self.symbols.get(left.next as usize) {
            Some(right) => self.merges.rank(left.id, right.id),
            None => NONE,
        };
        self.symbols[position as usize].rank = rank;
        if rank == NONE {
        } else if rank > floor {
            self.put(rank, position);
        } else {
            self.urgent.push(Reverse((rank, position)));
        }
    }
}

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
    fn merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
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
        fn both_ways_equal_the_definition(merges in merges(), word in "[a-d]{0,48}", long in "([a-d]{1,6}){1,40}") {
            let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
            let mut scratch = MergeScratch::default();
            for word in [word.as_bytes(), long.as_bytes()] {
                let expected = naive(&merges, word);
                if word.len() <= SHORT {
                    let mut out = Vec::new();
                    table.encode_short(word, &mut out);
                    prop_assert_eq!(&out, &expected);
                }
                let mut out = Vec::new();
                table.encode_long(word, &mut scratch, &mut out);
                prop_assert_eq!(&out, &expected);
            }
        }

        #[test]
        fn runs_of_one_letter_equal_the_definition(n in 0usize..200) {
            let merges = [(97, 97, 300), (300, 300, 301), (301, 97, 302), (302, 302, 303), (300, 97, 304)];
            let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
            let word = vec![b'a'; n];
            let mut out = Vec::new();
            table.encode_long(&word, &mut MergeScratch::default(), &mut out);
            prop_assert_eq!(out, naive(&merges, &word));
        }
    }
}
