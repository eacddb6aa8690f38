//! The word cache of one thread: which tokens a word gave the last time.
//!
//! Same results as no cache at all, in bounded memory: 2^16 places, half of them ever used, for words of at most
//! [`SHORT`] bytes, and [`LONG_ENTRIES`] words of at most [`LONG`] bytes. Nothing is evicted; a full cache only stops
//! learning.

use std::collections::HashMap;

/// Longest word that is its own key.
pub(crate) const SHORT: usize = 15;
/// Longest word that is kept at all.
pub(crate) const LONG: usize = 256;
const LONG_ENTRIES: usize = 4096;
const LONG_BYTES: usize = 1 << 18;
const BITS: u32 = 16;
const INLINE: usize = 3;
/// How many places are tried: a crowded neighbourhood is a miss, never a long walk.
const PROBES: usize = 8;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The bytes of the word and its length; 0 is free.
    key: u128,
    /// The tokens, or where they start in the arena.
    ids: [i32; INLINE],
    count: u32,
}

/// Words and their tokens.
#[derive(Debug, Default)]
pub(crate) struct WordCache {
    entries: Vec<Entry>,
    used: usize,
    long: HashMap<Box<[u8]>, (u32, u32)>,
    long_bytes: usize,
    arena: Vec<i32>,
}

/// The key of the word `text[start..end]` of at most [`SHORT`] bytes.
#[inline]
pub(crate) fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    let sixteen = match text.get(start..).and_then(|rest| rest.first_chunk::<16>()) {
        Some(chunk) => *chunk,
        None => copied(text, start, end),
    };
    let bits = len as u32 * 8;
    u128::from_le_bytes(sixteen) & ((1 << bits) - 1) | (len as u128) << 120
}

#[cold]
fn copied(text: &[u8], start: usize, end: usize) -> [u8; 16] {
    let mut sixteen = [0; 16];
    sixteen[..end - start].copy_from_slice(&text[start..end]);
    sixteen
}

#[inline]
fn place(key: u128) -> usize {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let product =
        u128::from(low ^ 0x9e37_79b9_7f4a_7c15) * u128::from(high ^ 0xc2b2_ae3d_27d4_eb4f);
    let folded = (product as u64) ^ (product >> 64) as u64;
    (folded >> (u64::BITS - BITS)) as usize
}

impl WordCache {
    /// Appends the tokens of a short word to `out` if it is known.
    #[inline]
    pub(crate) fn get_short(&self, key: u128, out: &mut Vec<i32>) -> bool {
        let mut at = place(key);
        for _ in 0..PROBES {
            let Some(entry) = self.entries.get(at) else { return false };
            if entry.key == key {
                if entry.count == 1 {
                    out.push(entry.ids[0]);
                } else {
                    self.get_many(entry, out);
                }
                return true;
            }
            if entry.key == 0 {
                return false;
            }
            at = (at + 1) & ((1 << BITS) - 1);
        }
        false
    }

    #[inline]
    fn get_many(&self, entry: &Entry, out: &mut Vec<i32>) {
        let count = entry.count as usize;
        if count <= INLINE {
            out.extend_from_slice(&entry.ids[..count]);
        } else {
            let from = entry.ids[0] as usize;
            out.extend_from_slice(&self.arena[from..from + count]);
        }
    }

    /// Remembers the tokens of a short word, unless half of the places are taken.
    pub(crate) fn put_short(&mut self, key: u128, ids: &[i32]) {
        if self.entries.is_empty() {
            self.entries.resize(1 << BITS, Entry::default());
        }
        if self.used >= 1 << (BITS - 1) {
            return;
        }
        let mut at = place(key);
        for _ in 0..PROBES {
            if self.entries[at].key == 0 {
                let mut entry = Entry { key, ids: [0; INLINE], count: ids.len() as u32 };
                if ids.len() <= INLINE {
                    entry.ids[..ids.len()].copy_from_slice(ids);
                } else {
                    entry.ids[0] = self.arena.len() as i32;
                    self.arena.extend_from_slice(ids);
                }
                self.entries[at] = entry;
                self.used += 1;
                return;
            }
            at = (at + 1) & ((1 << BITS) - 1);
        }
    }

    /// Appends the tokens of a long word to `out` if it is known.
    pub(crate) fn get_long(&self, word: &[u8], out: &mut Vec<i32>) -> bool {
        let Some(&(from, count)) = self.long.get(word) else { return false };
        out.extend_from_slice(&self.arena[from as usize..(from + count) as usize]);
        true
    }

    /// Remembers the tokens of a long word while there is room.
    pub(crate) fn put_long(&mut self, word: &[u8], ids: &[i32]) {
        if self.long.len() < LONG_ENTRIES && self.long_bytes + word.len() <= LONG_BYTES {
            self.long_bytes += word.len();
            self.long.insert(word.into(), (self.arena.len() as u32, ids.len() as u32));
            self.arena.extend_from_slice(ids);
        }
    }

    /// Forgets everything, for another model.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
            + self.arena.capacity() * size_of::<i32>()
            + self.long.capacity() * (size_of::<(Box<[u8]>, u64)>() + 1)
            + self.long_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cache_gives_what_was_put_or_nothing(words in proptest::collection::vec("[a-c]{1,20}", 1..300)) {
            let mut cache = WordCache::default();
            for word in &words {
                let ids: Vec<i32> = word.bytes().map(i32::from).collect();
                let mut found = Vec::new();
                let hit = if word.len() <= SHORT {
                    let key = short_key(word.as_bytes(), 0, word.len());
                    let hit = cache.get_short(key, &mut found);
                    if !hit { cache.put_short(key, &ids); }
                    hit
                } else {
                    let hit = cache.get_long(word.as_bytes(), &mut found);
                    if !hit { cache.put_long(word.as_bytes(), &ids); }
                    hit
                };
                prop_assert!(!hit || found == ids);
            }
        }

        #[test]
        fn a_key_does_not_depend_on_what_surrounds_the_word(word in "\\PC{0,15}", before in "\\PC{0,5}", after in "\\PC{0,20}") {
            prop_assume!(word.len() <= SHORT && !word.is_empty());
            let text = format!("{before}{word}{after}");
            let alone = short_key(word.as_bytes(), 0, word.len());
            prop_assert_eq!(short_key(text.as_bytes(), before.len(), before.len() + word.len()), alone);
        }
    }

    #[test]
    fn memory_is_bounded_however_many_words_come() {
        let mut cache = WordCache::default();
        for i in 0..400_000u32 {
            let word = format!("{i:015}");
            cache.put_short(short_key(word.as_bytes(), 0, 15), &[7; 15]);
            cache.put_long(format!("{i:0200}").as_bytes(), &[7; 200]);
        }
        assert!(cache.bytes() < 12 << 20, "{}", cache.bytes());
    }
}
