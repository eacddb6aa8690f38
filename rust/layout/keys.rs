//! Keys of sequences: 128 bits of what a model saw, and a table from keys to row numbers.

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::Lists;
use crate::error::{Error, Result};

/// Another number whenever the bytes that are hashed change.
const VERSION: u64 = 1;
/// Sequences of one piece of work.
const PIECE: usize = 4096;
/// Examples whose ids are in the cache at once.
const NEAR: usize = 64;

/// A key, most significant half first.
pub type Key = [u64; 2];

/// Completions, and a factor of each token's log-prob where there is one.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// Ids of the completions.
    pub ids: Lists<'a>,
    /// As long as the ids.
    pub weights: Option<&'a [f32]>,
}

/// Bytes of one piece of [`digest`].
const PIECE_BYTES: usize = 1 << 20;

/// XXH3 (128 bits, seed 1) of the XXH3 of each 2^20 bytes, each little-endian.
///
/// # Errors
/// [`Error::Interrupted`] if `cancelled` says so.
pub fn digest(bytes: &[u8], cancelled: impl Fn() -> bool + Sync) -> Result<[u8; 16]> {
    let piece = |bytes: &[u8]| {
        if cancelled() {
            return Err(Error::Interrupted);
        }
        Ok(xxh3_128_with_seed(bytes, VERSION).to_le_bytes())
    };
    let pieces: Vec<[u8; 16]> = if bytes.len() <= PIECE_BYTES {
        bytes.chunks(PIECE_BYTES).map(piece).collect::<Result<_>>()?
    } else {
        bytes.par_chunks(PIECE_BYTES).map(piece).collect::<Result<_>>()?
    };
    piece(pieces.as_flattened())
}

/// The keys of the examples `index`, all sides of one after the other.
///
/// Same as XXH3 (128 bits, seed 1) of: numbers of ids of the prompt and of the side, and 1 or 0 for weights (64 bits
/// each), XXH3 of the ids of the prompt (its first 64 bits, then its last), ids of the side (32 bits), weights
/// (float32), all little-endian. Weights that are all 1 are none, and -0 is 0.
///
/// # Errors
/// [`Error::Tensor`] if there is no such example; [`Error::Interrupted`] if `cancelled` says so.
pub fn sequence_keys(
    prompt: Lists<'_>,
    sides: &[Side<'_>],
    index: &[i64],
    out: &mut [Key],
    cancelled: impl Fn() -> bool + Sync,
) -> Result<()> {
    let width = sides.len();
    if width == 0 || out.len() != index.len() * width {
        return Err(Error::Internal("keys: one place a sequence".to_owned()));
    }
    let work = |(index, out): (&[i64], &mut [Key])| {
        if cancelled() {
            return Err(Error::Interrupted);
        }
        let mut bytes = Vec::new();
        for (index, out) in index.chunks(NEAR).zip(out.chunks_mut(NEAR * width)) {
            fetch(prompt, sides, index);
            for (i, keys) in index.iter().zip(out.chunks_exact_mut(width)) {
                let i = usize::try_from(*i).unwrap_or(usize::MAX);
                let ids = prompt.get(i)?;
                let prompt = (ids.len() as u64, key_of(words_of(ids, &mut bytes)));
                for (side, key) in sides.iter().zip(keys) {
                    *key = sequence_key(prompt, side, i, &mut bytes)?;
                }
            }
        }
        Ok(())
    };
    if index.len() <= PIECE {
        return work((index, out));
    }
    index.par_chunks(PIECE).zip(out.par_chunks_mut(PIECE * width)).try_for_each(work)
}

/// Reads a word of every cache line that these examples need: independent of each other, the reads wait for memory
/// together, while a hash would wait for its lines one by one.
fn fetch(prompt: Lists<'_>, sides: &[Side<'_>], index: &[i64]) {
    let mut seen = 0;
    for i in index.iter().filter_map(|i| usize::try_from(*i).ok()) {
        for lists in std::iter::once(&prompt).chain(sides.iter().map(|side| &side.ids)) {
            seen ^= lists.get(i).unwrap_or_default().iter().step_by(16).fold(0, |a, b| a ^ b);
        }
    }
    std::hint::black_box(seen);
}

fn sequence_key(
    (prompt_len, prompt): (u64, Key),
    side: &Side<'_>,
    i: usize,
    bytes: &mut Vec<u8>,
) -> Result<Key> {
    let ids = side.ids.get(i)?;
    let weights = match side.weights {
        None => None,
        Some(all) => Some(side.ids.beside(all, i)?).filter(|w| w.iter().any(|x| !is_one(*x))),
    };
    let head = [prompt_len, ids.len() as u64, u64::from(weights.is_some()), prompt[0], prompt[1]];
    let weights = weights.unwrap_or_default();
    let bytes = room(bytes, HEAD + 4 * (ids.len() + weights.len()));
    let (places, words) = bytes.split_at_mut(HEAD);
    for (place, number) in places.chunks_exact_mut(8).zip(head) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    let (words, factors) = words.split_at_mut(4 * ids.len());
    fill(words, ids);
    for (place, weight) in factors.chunks_exact_mut(4).zip(weights) {
        place.copy_from_slice(&(weight + 0.0).to_le_bytes());
    }
    Ok(key_of(bytes))
}

/// Bytes before the ids of a side.
const HEAD: usize = 40;

fn key_of(bytes: &[u8]) -> Key {
    let hash = xxh3_128_with_seed(bytes, VERSION);
    [(hash >> 64) as u64, hash as u64]
}

/// The first bytes of a buffer, which only grows.
fn room(bytes: &mut Vec<u8>, size: usize) -> &mut [u8] {
    if bytes.len() < size {
        bytes.resize(size, 0);
    }
    bytes.get_mut(..size).unwrap_or_default()
}

fn words_of<'b>(ids: &[i32], bytes: &'b mut Vec<u8>) -> &'b [u8] {
    let bytes = room(bytes, 4 * ids.len());
    fill(bytes, ids);
    bytes
}

fn fill(bytes: &mut [u8], ids: &[i32]) {
    for (place, id) in bytes.chunks_exact_mut(4).zip(ids) {
        place.copy_from_slice(&id.to_le_bytes());
    }
}

fn is_one(weight: f32) -> bool {
    weight.to_bits() == 1.0_f32.to_bits()
}

/// Rows by key, numbered in the order in which they came.
///
/// Open addressing with linear probes. Keys are hashes already: their first bits say where to look, so that keys in
/// rising order fill the table from its start to its end.
#[derive(Debug, Default)]
pub struct KeyTable {
    keys: Vec<Key>,
    /// Row + 1, 0 where a place is free; a power of two of them, at most two thirds taken.
    places: Vec<u32>,
}

impl KeyTable {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Makes room for `more` rows.
    ///
    /// # Errors
    /// [`Error::Value`] if there are more rows than 32 bits count, or no memory.
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        let full = |_| Error::Value(format!("no memory for {more} more keys"));
        let rows = self.keys.len().saturating_add(more);
        if rows >= u32::MAX as usize {
            return Err(Error::Value(format!("expected fewer than 2^32 - 1 rows, found {rows}")));
        }
        self.keys.try_reserve(more).map_err(full)?;
        let wanted = (rows + rows / 2 + 1).next_power_of_two().max(16);
        if wanted > self.places.len() {
            let mut places = Vec::new();
            places.try_reserve_exact(wanted).map_err(full)?;
            places.resize(wanted, 0);
            self.places = places;
            for row in 0..self.keys.len() {
                if let Some(key) = self.keys.get(row).copied() {
                    let place = self.place(key);
                    self.take(place, row);
                }
            }
        }
        Ok(())
    }

    /// The row of each key, a new one if it was not there.
    ///
    /// # Errors
    /// Those of [`KeyTable::reserve`]; [`Error::Interrupted`] if `cancelled` says so, with some of the keys added.
    pub fn add(
        &mut self,
        keys: &[Key],
        rows: &mut [i64],
        cancelled: impl Fn() -> bool,
    ) -> Result<()> {
        for (keys, rows) in keys.chunks(PIECE).zip(rows.chunks_mut(PIECE)) {
            if cancelled() {
                return Err(Error::Interrupted);
            }
            self.reserve(keys.len())?;
            for (key, row) in keys.iter().zip(rows) {
                let place = self.place(*key);
                *row = match self.places.get(place) {
                    Some(0) | None => {
                        let new = self.keys.len();
                        self.keys.push(*key);
                        self.take(place, new);
                        new as i64
                    }
                    Some(taken) => i64::from(taken - 1),
                };
            }
        }
        Ok(())
    }

    /// The row of each key, -1 if there is none.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `cancelled` says so.
    pub fn find(
        &self,
        keys: &[Key],
        rows: &mut [i64],
        cancelled: impl Fn() -> bool + Sync,
    ) -> Result<()> {
        let fill = |(keys, rows): (&[Key], &mut [i64])| {
            if cancelled() {
                return Err(Error::Interrupted);
            }
            for (keys, rows) in keys.chunks(NEAR).zip(rows.chunks_mut(NEAR)) {
                self.fetch(keys);
                for (key, row) in keys.iter().zip(rows) {
                    let place = self.places.get(self.place(*key));
                    *row = place.map_or(-1, |taken| i64::from(*taken) - 1);
                }
            }
            Ok(())
        };
        if keys.len() <= PIECE {
            return fill((keys, rows));
        }
        keys.par_chunks(PIECE).zip(rows.par_chunks_mut(PIECE)).try_for_each(fill)
    }

    /// Reads where these keys are looked for first, so that the reads wait for memory together.
    fn fetch(&self, keys: &[Key]) {
        let mut rows = [0; NEAR];
        for (row, key) in rows.iter_mut().zip(keys) {
            *row = self.places.get(self.first(*key)).copied().unwrap_or(0);
        }
        let known = |row: &u32| self.keys.get((*row as usize).wrapping_sub(1)).map_or(0, |k| k[0]);
        std::hint::black_box(rows.iter().fold(0, |seen, row| seen ^ known(row)));
    }

    /// Where the probes for a key begin.
    fn first(&self, key: Key) -> usize {
        let shift = 64 - self.places.len().trailing_zeros().min(64);
        key[0].checked_shr(shift).unwrap_or(0) as usize
    }

    /// Where a key stands, or the free place where it would.
    fn place(&self, key: Key) -> usize {
        let mask = self.places.len().wrapping_sub(1);
        let mut place = self.first(key);
        loop {
            match self.places.get(place) {
                Some(taken) if *taken != 0 && self.keys.get(*taken as usize - 1) != Some(&key) => {
                    place = (place + 1) & mask;
                }
                _ => return place,
            }
        }
    }

    fn take(&mut self, place: usize, row: usize) {
        if let Some(taken) = self.places.get_mut(place) {
            *taken = row as u32 + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn keys(prompt: &[i32], side: &[i32], weights: Option<&[f32]>) -> Key {
        let (p, s) = ([0, prompt.len() as i64], [0, side.len() as i64]);
        let mut out = [[0, 0]];
        let side = Side { ids: Lists::trusted(side, &s), weights };
        sequence_keys(Lists::trusted(prompt, &p), &[side], &[0], &mut out, || false).unwrap();
        out[0]
    }

    #[test]
    fn a_key_is_the_hash_of_the_bytes_that_its_doc_names() {
        let prompt: Vec<u8> = [7i32, 8].iter().flat_map(|n| n.to_le_bytes()).collect();
        let prompt = xxh3_128_with_seed(&prompt, 1);
        let head = [2, 1, 0, (prompt >> 64) as u64, prompt as u64];
        let head: Vec<u8> = head.iter().flat_map(|n: &u64| n.to_le_bytes()).collect();
        let hash = xxh3_128_with_seed(&[head, 9i32.to_le_bytes().to_vec()].concat(), 1);
        assert_eq!(keys(&[7, 8], &[9], None), [(hash >> 64) as u64, hash as u64]);
    }

    #[test]
    fn a_digest_is_the_hash_of_the_hashes_of_its_pieces() {
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES / 2).map(|i| (i * i) as u8).collect();
        let hash = |bytes: &[u8]| xxh3_128_with_seed(bytes, 1).to_le_bytes();
        let (first, rest) = bytes.split_at(PIECE_BYTES);
        let want = hash(&[hash(first), hash(rest)].concat());
        assert_eq!(digest(&bytes, || false).unwrap(), want);
        assert!(digest(&bytes, || true).is_err());
    }

    #[test]
    fn the_border_and_the_weights_count_and_weights_of_one_do_not() {
        let key = keys(&[1, 2], &[3, 4], None);
        assert_eq!(key, keys(&[1, 2], &[3, 4], Some(&[1.0, 1.0])));
        assert_ne!(key, keys(&[1], &[2, 3, 4], None));
        assert_ne!(key, keys(&[1, 2], &[4, 3], None));
        assert_ne!(key, keys(&[1, 2], &[3, 4], Some(&[1.0, 0.5])));
        let zero = keys(&[1, 2], &[3, 4], Some(&[1.0, 0.0]));
        assert_eq!(zero, keys(&[1, 2], &[3, 4], Some(&[1.0, -0.0])));
    }

    #[test]
    fn an_example_that_is_not_there_is_an_error() {
        let lists = Lists::trusted(&[1], &[0, 1]);
        let side = [Side { ids: lists, weights: None }];
        for i in [-1, 1, i64::MAX] {
            assert!(sequence_keys(lists, &side, &[i], &mut [[0, 0]], || false).is_err());
        }
    }

    proptest! {
        #[test]
        fn a_table_is_a_hash_map(
            // Few first halves, so that probes run into each other.
            given in prop::collection::vec(prop::collection::vec((0u64..8, 0u64..40), 0..60), 0..8),
        ) {
            let (mut table, mut map) = (KeyTable::default(), HashMap::new());
            for part in given {
                let part: Vec<Key> = part.into_iter().map(|(a, b)| [a, b]).collect();
                let mut found = vec![0; part.len()];
                table.find(&part, &mut found, || false).unwrap();
                let want: Vec<i64> =
                    part.iter().map(|k| map.get(k).copied().unwrap_or(-1)).collect();
                prop_assert_eq!(&found, &want);
                table.add(&part, &mut found, || false).unwrap();
                for (key, row) in part.iter().zip(found) {
                    let new = map.len() as i64;
                    prop_assert_eq!(*map.entry(*key).or_insert(new), row);
                }
                prop_assert_eq!(table.len(), map.len());
            }
        }
    }
}
