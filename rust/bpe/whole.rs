//! Words that are one token, found without a merge: most words that nobody has seen before are.

use super::key::{Key, TINY};
use super::ranks::{BITS, Merges, NONE};

const FREE: u64 = u64::MAX;

/// The tokens of a vocabulary by their bytes, as far as these are words that become the token alone.
#[derive(Debug)]
pub(crate) struct Whole {
    /// The bytes of all tokens by id, and where each begins; of those that no bytes make, none.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    /// Words of at most [`TINY`] bytes with their ids: one read of memory each.
    tiny: Vec<u128>,
    tiny_shift: u32,
    /// Of longer ones the high bits of a hash, and below them the id.
    slots: Vec<u64>,
    shift: u32,
}

impl Whole {
    /// `tokens` holds the bytes by id, `is_whole` says which of them count.
    pub(crate) fn new(
        tokens: impl Iterator<Item = Option<Vec<u8>>>,
        is_whole: impl Fn(usize) -> bool,
    ) -> Self {
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for token in tokens {
            bytes.extend(token.unwrap_or_default());
            starts.push(bytes.len() as u32);
        }
        let mut whole =
            Self { bytes, starts, tiny: vec![], tiny_shift: 0, slots: vec![], shift: 0 };
        let counts = |&id: &usize| !whole.token(id).is_empty() && is_whole(id);
        let (tiny, longer): (Vec<usize>, Vec<usize>) =
            (0..whole.ids()).filter(counts).partition(|&id| whole.token(id).len() <= TINY);
        (whole.tiny, whole.tiny_shift) = (vec![0; places(tiny.len())], shift(tiny.len()));
        for id in tiny {
            let key = Key::new(whole.token(id));
            let mut at = (key.hash() >> whole.tiny_shift) as usize;
            while whole.tiny[at] != 0 {
                at = (at + 1) % whole.tiny.len();
            }
            whole.tiny[at] = key.beside(id as u32);
        }
        (whole.slots, whole.shift) = (vec![FREE; places(longer.len())], shift(longer.len()));
        for id in longer {
            let hash = Key::new(whole.token(id)).hash();
            let mut at = (hash >> whole.shift) as usize;
            while whole.slots[at] != FREE {
                at = (at + 1) % whole.slots.len();
            }
            whole.slots[at] = hash >> BITS << BITS | id as u64;
        }
        whole
    }

    /// One more than the largest id.
    pub(crate) fn ids(&self) -> usize {
        self.starts.len() - 1
    }

    fn token(&self, id: usize) -> &[u8] {
        &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize]
    }

    /// How many bytes a token has.
    #[inline]
    pub(crate) fn bytes_of(&self, id: i32) -> usize {
        let id = id as usize;
        (self.starts[id + 1] - self.starts[id]) as usize
    }

    /// The token that `word` of this key is.
    #[inline]
    pub(crate) fn find(&self, key: Key, word: &[u8]) -> Option<i32> {
        if word.len() > TINY { self.find_longer(key, word) } else { self.find_tiny(key) }
    }

    /// [`Self::find`] for a word of at most [`TINY`] bytes.
    #[inline]
    pub(crate) fn find_tiny(&self, key: Key) -> Option<i32> {
        let mut at = (key.hash() >> self.tiny_shift) as usize;
        loop {
            let slot = *self.tiny.get(at)?;
            if slot == 0 {
                return None;
            }
            if let Some(id) = key.id_in(slot) {
                return Some(id as i32);
            }
            at = (at + 1) & (self.tiny.len() - 1);
        }
    }

    fn find_longer(&self, key: Key, word: &[u8]) -> Option<i32> {
        let hash = key.hash();
        let mut at = (hash >> self.shift) as usize;
        loop {
            let slot = *self.slots.get(at)?;
            if slot == FREE {
                return None;
            }
            let id = slot & u64::from(NONE);
            if (slot ^ hash) >> BITS == 0 && self.token(id as usize) == word {
                return Some(id as i32);
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }
}

/// Places for so many words: a third is free at least.
fn places(words: usize) -> usize {
    (words * 3 / 2).next_power_of_two().max(16)
}

fn shift(words: usize) -> u32 {
    u64::BITS - places(words).trailing_zeros()
}

/// How a token comes about: the last merge of its own bytes, and when, which is 0 for a byte and else its rank + 1.
#[derive(Debug, Clone, Copy, Default)]
struct Made {
    left: u32,
    right: u32,
    time: u32,
}

/// Which of `ids` ids are all that their own bytes merge to, as far as that is proven here.
///
/// Same as merging the bytes of each, which takes ten times as long. Let (l, r) make a token at rank k, where the bytes
/// of l become l alone and those of r become r alone, and let every merge of what any of them is made of come later than
/// the merges that make it. Then ranks are times: a merge across the border between l and r, of some x that ends l and
/// some y that begins r, happens if and only if its rank is below those of the merges that use up x and y (of equals the
/// left one comes first). If there is none, what is left of both is l and r, and their merge ends it.
pub(crate) fn proven(ids: usize, merges: &[(u32, u32, u32)], table: &Merges) -> Vec<bool> {
    let mut made = vec![Made::default(); ids];
    let mut known = vec![false; ids];
    // The others are in no UTF-8 text and may lack a token.
    for byte in (0..=0xf4).filter(|byte| !matches!(byte, 0xc0 | 0xc1)) {
        known[table.byte_id(byte) as usize] = true;
    }
    for (&(left, right, id), rank) in merges.iter().zip(0u32..) {
        let counts = table.rank(left, right) == rank && table.is_calm(rank);
        if counts
            && !known[id as usize]
            && known[left as usize]
            && known[right as usize]
            && !is_crossed(left, right, &made, table)
        {
            known[id as usize] = true;
            made[id as usize] = Made { left, right, time: rank + 1 };
        }
    }
    known
}

/// Whether something merges across the border of two tokens while they come about. Goes back in time from both.
fn is_crossed(left: u32, right: u32, made: &[Made], table: &Merges) -> bool {
    let (mut x, mut y) = (left, right);
    let (mut x_used, mut y_used) = (u32::MAX, u32::MAX);
    loop {
        let (of_x, of_y) = (made[x as usize], made[y as usize]);
        if of_x.time == 0 && of_y.time == 0 {
            return false;
        }
        if of_y.time >= of_x.time {
            (y, y_used) = (of_y.left, of_y.time);
        } else {
            (x, x_used) = (of_x.right, of_x.time);
        }
        let rank = table.rank(x, y);
        if rank != NONE && rank + 1 < x_used && rank < y_used {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpe::merge::{MergeScratch, random_merges};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_proven_is_what_the_bytes_merge_to(merges in random_merges()) {
            let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
            let ids = merges.iter().map(|m| m.0.max(m.1).max(m.2) as usize + 1).max().unwrap_or(0).max(256);
            let known = proven(ids, &merges, &table);
            let mut spelt: Vec<Option<Vec<u8>>> = (0..ids).map(|i| u8::try_from(i).ok().map(|b| vec![b])).collect();
            // Merges are in any order, so what they are made of may come behind them.
            for _ in 0..merges.len() {
                for &(left, right, id) in &merges {
                    if let (Some(left), Some(right)) = (spelt[left as usize].clone(), spelt[right as usize].clone()) {
                        spelt[id as usize] = Some([left, right].concat());
                    }
                }
            }
            let whole = Whole::new(spelt.iter().cloned(), |id| known[id]);
            for (id, bytes) in spelt.iter().enumerate().filter_map(|(id, bytes)| Some((id, bytes.as_ref()?))) {
                let mut out = Vec::new();
                table.encode(bytes, &mut MergeScratch::default(), &mut out);
                let found = whole.find(Key::new(bytes), bytes);
                prop_assert!(found.is_none_or(|found| out == [found] && found == id as i32));
                prop_assert_eq!(whole.bytes_of(id as i32), bytes.len());
            }
        }
    }

    #[test]
    fn a_token_that_a_merge_across_its_halves_prevents_is_not_whole() {
        // "ab" comes first, so that "a" and "bc" never meet.
        let (a, b, c) = (97, 98, 99);
        let merges = [(a, b, 300), (b, c, 301), (a, 301, 302), (300, c, 303)];
        let table = Merges::new(&std::array::from_fn(|i| i as u32), &merges);
        let known = proven(304, &merges, &table);
        assert_eq!([300, 301, 302, 303].map(|id: usize| known[id]), [true, true, false, true]);
    }
}
