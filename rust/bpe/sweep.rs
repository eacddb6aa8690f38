//! Merging a very long word rank by rank.
//!
//! The positions wait in one list per rank. Lists are taken from the lowest rank up; what appears at or below the rank
//! that is being worked on goes through a heap, so the order is exact whatever the merges are. Lists are filled in the
//! order of positions but for interleavings, so sorting them is nearly free: O(n log n) at worst, O(n) for what people
//! write and for long runs of one character. Memory is read in order, which a search for the lowest rank does not do.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::ranks::{Merges, NONE};

/// No position, no list.
const NOWHERE: u32 = u32::MAX;

/// One token in work, at the position of its first byte.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    /// Rank of the pair with the next symbol; `NONE` if none, and once merged into the symbol to the left.
    rank: u32,
    next: u32,
    previous: u32,
}

/// Reused memory of [`encode`].
#[derive(Debug, Default)]
pub(crate) struct SweepScratch {
    symbols: Vec<Symbol>,
    /// The list of each rank; of none between two words.
    bucket_of: Vec<u32>,
    buckets: Vec<Vec<u32>>,
    free: Vec<u32>,
}

/// Appends the tokens of `word` to `out`.
pub(crate) fn encode(merges: &Merges, word: &[u8], scratch: &mut SweepScratch, out: &mut Vec<i32>) {
    let mut work = Sweep::new(merges, scratch, word);
    while let Some(Reverse(rank)) = work.active.pop() {
        let mut list = work.take(rank);
        if !list.is_sorted() {
            list.sort_unstable();
        }
        if merges.is_calm(rank) {
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

/// One word in work: a linked list of symbols, and the positions by rank.
struct Sweep<'a> {
    merges: &'a Merges,
    symbols: &'a mut Vec<Symbol>,
    bucket_of: &'a mut Vec<u32>,
    buckets: &'a mut Vec<Vec<u32>>,
    free: &'a mut Vec<u32>,
    active: BinaryHeap<Reverse<u32>>,
    urgent: BinaryHeap<Reverse<(u32, u32)>>,
}

impl<'a> Sweep<'a> {
    fn new(merges: &'a Merges, scratch: &'a mut SweepScratch, word: &[u8]) -> Self {
        let SweepScratch { symbols, bucket_of, buckets, free } = scratch;
        symbols.clear();
        symbols.extend(word.iter().zip(0u32..).map(|(&byte, i)| Symbol {
            id: merges.byte_id(byte),
            rank: NONE,
            next: i + 1,
            previous: i.wrapping_sub(1),
        }));
        // A scratch may serve several models.
        if bucket_of.len() < merges.len() {
            bucket_of.resize(merges.len(), NOWHERE);
        }
        let (active, urgent) = (BinaryHeap::new(), BinaryHeap::new());
        let mut this = Self { merges, symbols, bucket_of, buckets, free, active, urgent };
        for (two, i) in word.windows(2).zip(0u32..) {
            let rank = merges.byte_rank(two[0], two[1]);
            this.symbols[i as usize].rank = rank;
            if rank != NONE {
                this.put(rank, i);
            }
        }
        this
    }

    /// Adds a position to the list of its rank.
    fn put(&mut self, rank: u32, position: u32) {
        let mut bucket = self.bucket_of[rank as usize];
        if bucket == NOWHERE {
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
        let bucket = std::mem::replace(&mut self.bucket_of[rank as usize], NOWHERE);
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
        let mut last = NOWHERE;
        for &position in &*list {
            let before = self.symbols[position as usize].previous;
            if before != NOWHERE && before != last {
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
        let id = self.merges.made(rank);
        self.symbols[position as usize] = Symbol { id, rank: NONE, next, ..left };
        true
    }

    /// Ranks of the pairs on both sides of a new symbol.
    fn renew(&mut self, position: u32, floor: u32) {
        let before = self.symbols[position as usize].previous;
        if before != NOWHERE {
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
