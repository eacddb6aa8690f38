//! The word cache of one thread: which tokens a word gave the last time.
//!
//! Same results as no cache at all, in bounded memory. Words go to the young half; when that is full it becomes the old
//! half, and the old one is emptied. A word of the old half that comes again goes to the young one. So what has come
//! lately is known whatever came before it, and a word that keeps coming stays.

#![allow(clippy::inline_always)] // the hit of a short word is the whole of warm work

use super::key::{Key, MODELS};

/// Longest word that is kept at all.
pub(crate) const LONG: usize = 4096;
/// Places of a half at first and at most, in bits; half of them are ever used.
const FIRST_BITS: u32 = 14;
const MOST_BITS: u32 = 17;
/// What a half holds at most beside its places: bytes of long words, tokens that do not fit beside their word.
const BYTES: usize = 1 << 21;
const IDS: usize = 1 << 19;
const INLINE: usize = 3;
/// How many places are tried: a crowded neighbourhood is a miss, never a long walk.
const PROBES: usize = 16;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    key: Key,
    /// The tokens; or where they start among the half's, and for a long word where its bytes do.
    ids: [i32; INLINE],
    count: u32,
}

/// Words and their tokens.
#[derive(Debug, Default)]
struct Half {
    /// None, or [`FIRST_BITS`] and `growth` bits of them.
    entries: Vec<Entry>,
    growth: u32,
    used: usize,
    ids: Vec<i32>,
    bytes: Vec<u8>,
    /// A bit for each model that has a word here.
    models: u16,
}

impl Half {
    /// The entry of a key that `is_it`, because others may share the key of a long word.
    #[inline(always)]
    fn find(&self, key: Key, is_it: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        let mut at = self.place(key);
        for _ in 0..PROBES {
            let entry = self.entries.get(at)?;
            if entry.key == key && is_it(entry) {
                return Some(entry);
            }
            if entry.key.is_free() {
                return None;
            }
            at = (at + 1) & (self.entries.len() - 1);
        }
        None
    }

    #[inline(always)]
    fn place(&self, key: Key) -> usize {
        (key.hash() >> (u64::BITS - FIRST_BITS - self.growth)) as usize
    }

    #[inline(always)]
    fn find_short(&self, key: Key) -> Option<&Entry> {
        self.find(key, |_| true)
    }

    fn find_long(&self, key: Key, word: &[u8]) -> Option<&Entry> {
        self.find(key, |entry| {
            let start = entry.ids[1] as usize;
            self.bytes.get(start..start + word.len()) == Some(word)
        })
    }

    /// The tokens of an entry that are not beside its key.
    #[inline]
    fn many<'a>(&'a self, entry: &'a Entry, is_long: bool) -> &'a [i32] {
        let count = entry.count as usize;
        if count <= INLINE && !is_long {
            return &entry.ids[..count];
        }
        let from = entry.ids[0] as usize;
        &self.ids[from..from + count]
    }

    fn has_room(&self, word: Option<&[u8]>, ids: &[i32]) -> bool {
        self.used < 1 << (MOST_BITS - 1)
            && self.ids.len() + ids.len() <= IDS
            && self.bytes.len() + word.map_or(0, <[u8]>::len) <= BYTES
    }

    fn put(&mut self, key: Key, word: Option<&[u8]>, ids: &[i32]) {
        if 2 * self.used >= self.entries.len() {
            self.grow();
        }
        let mut entry = Entry { key, ids: [0; INLINE], count: ids.len() as u32 };
        if ids.len() <= INLINE && word.is_none() {
            entry.ids[..ids.len()].copy_from_slice(ids);
        } else {
            entry.ids[0] = self.ids.len() as i32;
            self.ids.extend_from_slice(ids);
        }
        if let Some(word) = word {
            entry.ids[1] = self.bytes.len() as i32;
            self.bytes.extend_from_slice(word);
        }
        self.place_entry(entry);
    }

    fn place_entry(&mut self, entry: Entry) {
        let first = self.place(entry.key);
        let mask = self.entries.len() - 1;
        let mut places = (0..PROBES).map(|step| (first + step) & mask);
        let free = places.find(|&at| self.entries[at].key.is_free());
        // In a crowded neighbourhood the newest word takes the place of another.
        self.used += usize::from(free.is_some());
        self.entries[free.unwrap_or(first)] = entry;
    }

    fn grow(&mut self) {
        self.growth = if self.entries.is_empty() { 0 } else { self.growth + 1 };
        let places = 1 << (FIRST_BITS + self.growth);
        let before = std::mem::replace(&mut self.entries, vec![Entry::default(); places]);
        self.used = 0;
        for entry in before {
            if !entry.key.is_free() {
                self.place_entry(entry);
            }
        }
    }

    fn clear(&mut self) {
        self.entries.fill(Entry::default());
        self.ids.clear();
        self.bytes.clear();
        self.used = 0;
        self.models = 0;
    }
}

/// Words and their tokens, of up to [`MODELS`] models.
#[derive(Debug, Default)]
pub(crate) struct WordCache {
    young: Half,
    old: Half,
    /// Whose words there are; the place of a model is part of its keys.
    models: Vec<u64>,
    model: u8,
}

impl WordCache {
    /// Serves another model from now on.
    pub(crate) fn select(&mut self, model: u64) {
        if self.models.get(usize::from(self.model)) == Some(&model) {
            return;
        }
        let known = self.models.iter().position(|known| *known == model);
        let place = known.unwrap_or_else(|| {
            if self.models.len() == MODELS {
                self.young.clear();
                self.old.clear();
                self.models.clear();
            }
            self.models.push(model);
            self.models.len() - 1
        });
        self.model = place as u8;
    }

    /// Appends the tokens of a short word to `out` if it is known.
    #[inline]
    pub(crate) fn get_short(&mut self, key: Key, out: &mut Vec<i32>) -> bool {
        let key = key.of_model(self.model);
        match self.young.find_short(key) {
            Some(entry) if entry.count == 1 => out.push(entry.ids[0]),
            Some(entry) => out.extend_from_slice(self.young.many(entry, false)),
            None => return self.get_old(key, None, out),
        }
        true
    }

    /// Appends the tokens of a word of more than [`super::key::SHORT`] bytes to `out` if it is known.
    pub(crate) fn get_long(&mut self, key: Key, word: &[u8], out: &mut Vec<i32>) -> bool {
        let key = key.of_model(self.model);
        match self.young.find_long(key, word) {
            Some(entry) => out.extend_from_slice(self.young.many(entry, true)),
            None => return self.get_old(key, Some(word), out),
        }
        true
    }

    #[cold]
    fn get_old(&mut self, key: Key, word: Option<&[u8]>, out: &mut Vec<i32>) -> bool {
        if self.old.models & 1 << self.model == 0 {
            return false;
        }
        let entry = match word {
            None => self.old.find_short(key),
            Some(word) => self.old.find_long(key, word),
        };
        let Some(entry) = entry else { return false };
        let before = out.len();
        out.extend_from_slice(self.old.many(entry, word.is_some()));
        self.put(key, word, &out[before..]);
        true
    }

    /// Remembers the tokens of a short word.
    pub(crate) fn put_short(&mut self, key: Key, ids: &[i32]) {
        self.put(key.of_model(self.model), None, ids);
    }

    /// Remembers the tokens of a word of more than [`super::key::SHORT`] and at most [`LONG`] bytes.
    pub(crate) fn put_long(&mut self, key: Key, word: &[u8], ids: &[i32]) {
        self.put(key.of_model(self.model), Some(word), ids);
    }

    fn put(&mut self, key: Key, word: Option<&[u8]>, ids: &[i32]) {
        if !self.young.has_room(word, ids) {
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.put(key, word, ids);
        self.young.models |= 1 << self.model;
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        let of = |half: &Half| {
            half.entries.capacity() * size_of::<Entry>()
                + half.ids.capacity() * size_of::<i32>()
                + half.bytes.capacity()
        };
        of(&self.young) + of(&self.old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpe::key::SHORT;
    use proptest::prelude::*;

    /// What a test's word is made of, in some model.
    fn ids_of(model: u64, word: &str) -> Vec<i32> {
        word.bytes().map(|byte| i32::from(byte) + model as i32 * 1000).collect()
    }

    fn get(cache: &mut WordCache, word: &str, out: &mut Vec<i32>) -> bool {
        if word.len() > SHORT {
            return cache.get_long(Key::new(word.as_bytes()), word.as_bytes(), out);
        }
        cache.get_short(Key::new(word.as_bytes()), out)
    }

    fn put(cache: &mut WordCache, word: &str, ids: &[i32]) {
        if word.len() > SHORT {
            return cache.put_long(Key::new(word.as_bytes()), word.as_bytes(), ids);
        }
        cache.put_short(Key::new(word.as_bytes()), ids);
    }

    /// Puts what is not there; whether it was.
    fn learn(cache: &mut WordCache, model: u64, word: &str) -> bool {
        let mut found = Vec::new();
        let hit = get(cache, word, &mut found);
        if hit {
            assert_eq!(found, ids_of(model, word));
        } else {
            put(cache, word, &ids_of(model, word));
        }
        hit
    }

    proptest! {
        #[test]
        fn a_cache_gives_what_the_model_put_or_nothing(
            words in proptest::collection::vec(("[a-c]{1,20}", 0u64..20, any::<bool>()), 1..300),
        ) {
            let mut cache = WordCache::default();
            for (word, model, turn) in words {
                cache.select(model);
                learn(&mut cache, model, &word);
                prop_assert!(learn(&mut cache, model, &word));
                if turn {
                    std::mem::swap(&mut cache.young, &mut cache.old);
                    cache.young.clear();
                }
            }
        }
    }

    #[test]
    fn memory_is_bounded_however_many_words_come() {
        let mut cache = WordCache::default();
        for i in 0..400_000u32 {
            put(&mut cache, &format!("{i:015}"), &[7; 15]);
            put(&mut cache, &format!("{i:0200}"), &[7; 200]);
        }
        assert!(cache.bytes() < 20 << 20, "{}", cache.bytes());
    }

    /// Other words, however many, make an earlier one unknown once at most, and a word that keeps coming never.
    #[test]
    fn what_comes_again_is_known_again() {
        let mut cache = WordCache::default();
        let common: Vec<String> =
            (0..10_000).map(|i| format!("common {i}, and some more")).collect();
        for round in 0..3 {
            for i in 0..90_000 {
                learn(&mut cache, 0, &format!("other {round} {i}"));
                learn(&mut cache, 0, "kept");
            }
            for word in &common {
                learn(&mut cache, 0, word);
            }
            let known = common.iter().filter(|word| learn(&mut cache, 0, word)).count();
            assert!(known > 9_900, "{known} of 10,000 words known in the second pass");
            assert!(learn(&mut cache, 0, "kept"));
        }
    }

    #[test]
    fn two_models_in_turn_keep_their_words() {
        let mut cache = WordCache::default();
        for round in 0..3 {
            for model in 0..MODELS as u64 {
                cache.select(model);
                let words = (0..1000).map(|i| format!("word {i}"));
                let known = words.filter(|word| learn(&mut cache, model, word)).count();
                assert!(round == 0 || known > 990, "{known} of 1,000 words known");
            }
        }
    }
}
