//! Which two tokens merge, how early, and into what.

#![allow(clippy::inline_always)] // compiled into the caller, once for each set of instructions

/// No merge. Ids and ranks are below this.
pub(crate) const NONE: u32 = (1 << BITS) - 1;

/// Bits of an id or a rank: three of them fit one slot.
pub(crate) const BITS: u32 = 21;
const FREE: u64 = u64::MAX;

/// (left, right) -> rank, by open addressing: one read of memory a look-up, mostly.
#[derive(Debug)]
struct Ranks {
    /// left, right and rank, from the highest bits down.
    slots: Vec<u64>,
    shift: u32,
    /// A bit for each pair, shared by some: small enough for the processor's cache, it answers most look-ups, which are
    /// of pairs that do not merge.
    seen: Vec<u64>,
}

impl Ranks {
    /// As [`Merges::new`].
    fn new(merges: &[(u32, u32, u32)]) -> Self {
        // A quarter is free at least: `seen` keeps away most look-ups of pairs that are not there.
        let size = (merges.len() * 4 / 3).next_power_of_two().max(16);
        let mut ranks = Self {
            slots: vec![FREE; size],
            shift: u64::BITS - size.trailing_zeros(),
            seen: vec![0; size / 8],
        };
        for (&(left, right, _), rank) in merges.iter().zip(0u32..) {
            let at = ranks.place(pair(left, right));
            ranks.slots[at] = pair(left, right) << BITS | u64::from(rank);
            let (word, bit) = ranks.bit(hash(pair(left, right)));
            ranks.seen[word] |= bit;
        }
        ranks
    }

    /// Where the pair is, or the free place where it would be.
    #[inline(always)]
    fn place(&self, pair: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (hash(pair) >> self.shift) as usize & mask;
        while self.slots[at] >> BITS != pair && self.slots[at] != FREE {
            at = (at + 1) & mask;
        }
        at
    }

    /// Where the bit of a pair is: by the high bits of its hash, as its slot, and three more.
    #[inline(always)]
    fn bit(&self, hash: u64) -> (usize, u64) {
        let high = hash >> (self.shift - 3);
        ((high >> 6) as usize & (self.seen.len() - 1), 1 << (high & 63))
    }

    /// Rank of the merge of two tokens, [`NONE`] if there is none.
    #[inline(always)]
    fn of(&self, left: u32, right: u32) -> u32 {
        let (word, bit) = self.bit(hash(pair(left, right)));
        if self.seen[word] & bit == 0 {
            return NONE;
        }
        // The low bits of a free slot are those of `NONE`.
        self.slots[self.place(pair(left, right))] as u32 & NONE
    }
}

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << BITS | u64::from(right)
}

#[inline(always)]
fn hash(pair: u64) -> u64 {
    pair.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The merges of one model.
#[derive(Debug)]
pub(crate) struct Merges {
    /// Token of every single byte.
    byte_ids: [u32; 256],
    /// Rank of the merge of every two bytes: every word begins with these, and the table stays in the cache.
    byte_ranks: Vec<u32>,
    ranks: Ranks,
    /// New id of each rank; where these count up, as in most files, their distance alone.
    result: Vec<u32>,
    distance: Option<u32>,
    /// Of each rank, [`Self::is_calm`].
    calm: Vec<bool>,
}

impl Merges {
    /// `merges` holds (left, right, new id) in the order of their ranks; of two with the same pair the later one counts.
    /// Ids and ranks are below [`NONE`].
    pub(crate) fn new(byte_ids: &[u32; 256], merges: &[(u32, u32, u32)]) -> Self {
        let ranks = Ranks::new(merges);
        let pairs = byte_ids.iter().flat_map(|&left| byte_ids.map(|right| (left, right)));
        let byte_ranks = pairs.map(|(left, right)| ranks.of(left, right)).collect();
        let result: Vec<u32> = merges.iter().map(|m| m.2).collect();
        let distance = result
            .first()
            .copied()
            .filter(|&first| (first..).take(result.len()).eq(result.iter().copied()));
        let ids = merges.iter().map(|m| m.0.max(m.1).max(m.2) as usize + 1).max().unwrap_or(0);
        let mut first_use = vec![NONE; ids];
        for (rank, &(left, right, _)) in merges.iter().enumerate().rev() {
            first_use[left as usize] = rank as u32;
            first_use[right as usize] = rank as u32;
        }
        let is_calm = |(merge, rank): (&(u32, u32, u32), u32)| first_use[merge.2 as usize] > rank;
        let calm = merges.iter().zip(0u32..).map(is_calm).collect();
        Self { byte_ids: *byte_ids, byte_ranks, ranks, result, distance, calm }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.result.len()
    }

    /// The token that the merge of a rank makes.
    #[inline(always)]
    pub(crate) fn made(&self, rank: u32) -> u32 {
        match self.distance {
            Some(distance) => rank + distance,
            None => self.result[rank as usize],
        }
    }

    /// Whether every merge that uses the token which the merge of this rank makes has a higher rank.
    #[inline(always)]
    pub(crate) fn is_calm(&self, rank: u32) -> bool {
        self.calm[rank as usize]
    }

    /// Token of a single byte.
    #[inline(always)]
    pub(crate) fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// Rank of the merge of two tokens, [`NONE`] if there is none.
    #[inline(always)]
    pub(crate) fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.of(left, right)
    }

    /// Rank of the merge of two bytes.
    #[inline(always)]
    pub(crate) fn byte_rank(&self, left: u8, right: u8) -> u32 {
        self.byte_ranks[usize::from(left) << 8 | usize::from(right)]
    }
}
