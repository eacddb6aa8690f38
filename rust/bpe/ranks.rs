//! Which two tokens merge, and how early.

/// No merge. Ids and ranks below this fit a [`Ranks`].
pub(crate) const NONE: u32 = (1 << BITS) - 1;

/// Bits of an id or a rank: three of them fit one slot.
pub(crate) const BITS: u32 = 21;
const FREE: u64 = u64::MAX;

/// (left, right) -> rank, by open addressing: one read of memory a look-up, mostly.
#[derive(Debug)]
pub(crate) struct Ranks {
    /// left, right and rank, from the highest bits down.
    slots: Vec<u64>,
    shift: u32,
    /// A bit for each pair, shared by some: small enough for the processor's cache, it answers most look-ups, which are
    /// of pairs that do not merge.
    seen: Vec<u64>,
}

impl Ranks {
    /// `merges` holds (left, right, new id) in the order of their ranks; of two with the same pair the later one counts.
    pub(crate) fn new(merges: &[(u32, u32, u32)]) -> Self {
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
    pub(crate) fn of(&self, left: u32, right: u32) -> u32 {
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
