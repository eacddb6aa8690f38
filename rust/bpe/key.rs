//! What a word is found by.

use super::ranks::BITS;

/// Longest word that is its own key.
pub(crate) const SHORT: usize = 15;
/// Longest word whose key has room for an id beside it.
pub(crate) const TINY: usize = 12;
/// Where such an id is: behind the bytes of the word, before its length.
const ID_SHIFT: u32 = 8 * TINY as u32;
const ID_MASK: u128 = (1 << BITS) - 1;
/// How many models' keys are told apart by [`Key::of_model`].
pub(crate) const MODELS: usize = 16;

/// A word of at most [`SHORT`] bytes itself with its length, or the digest of a longer one; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Key(u128);

impl Key {
    /// The key of the word `text[start..end]` of 1 to [`SHORT`] bytes.
    #[inline]
    pub(crate) fn short(text: &[u8], start: usize, end: usize) -> Self {
        let len = end - start;
        let sixteen = match text.get(start..).and_then(|rest| rest.first_chunk::<16>()) {
            Some(chunk) => *chunk,
            None => copied(text, start, end),
        };
        let bits = len as u32 * 8;
        Self(u128::from_le_bytes(sixteen) & ((1 << bits) - 1) | (len as u128) << 120)
    }

    /// The key of a longer word: others may share it.
    pub(crate) fn long(word: &[u8]) -> Self {
        // No length in the highest byte, so that no short word has it.
        Self(u128::from(digest(word)) | (word.len() as u128 & 0xffff_ffff) << 64 | 1 << 112)
    }

    /// The key of any word.
    pub(crate) fn new(word: &[u8]) -> Self {
        if word.len() > SHORT { Self::long(word) } else { Self::short(word, 0, word.len()) }
    }

    /// The same for one of [`MODELS`] models.
    #[inline]
    pub(crate) fn of_model(self, model: u8) -> Self {
        Self(self.0 | u128::from(model) << 124)
    }

    /// The key of a word of at most [`TINY`] bytes with an id, never 0.
    pub(crate) fn beside(self, id: u32) -> u128 {
        self.0 | u128::from(id) << ID_SHIFT
    }

    /// The id that [`Self::beside`] put beside this key.
    #[inline]
    pub(crate) fn id_in(self, slot: u128) -> Option<u32> {
        let is_mine = (slot ^ self.0) & !(ID_MASK << ID_SHIFT) == 0;
        is_mine.then_some((slot >> ID_SHIFT & ID_MASK) as u32)
    }

    #[inline]
    pub(crate) fn is_free(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(crate) fn hash(self) -> u64 {
        let (low, high) = (self.0 as u64, (self.0 >> 64) as u64);
        fold(low ^ 0x9e37_79b9_7f4a_7c15, high ^ 0xc2b2_ae3d_27d4_eb4f)
    }
}

#[cold]
fn copied(text: &[u8], start: usize, end: usize) -> [u8; 16] {
    let mut sixteen = [0; 16];
    sixteen[..end - start].copy_from_slice(&text[start..end]);
    sixteen
}

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    // Without the last term all words that make a factor 0 would have one hash.
    let both = (a ^ b.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product as u64 ^ (product >> 64) as u64 ^ both
}

/// 64 bits of more than [`SHORT`] bytes.
fn digest(word: &[u8]) -> u64 {
    let mixed = |digest: u64, sixteen: &[u8; 16]| {
        let both = u128::from_le_bytes(*sixteen);
        let (low, high) = (both as u64, (both >> 64) as u64);
        fold(low ^ digest, high ^ 0xc2b2_ae3d_27d4_eb4f)
    };
    let digest = word.as_chunks().0.iter().fold(0x9e37_79b9_7f4a_7c15, mixed);
    word.last_chunk().map_or(digest, |last| mixed(digest.rotate_left(23), last))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_that_make_a_factor_zero_have_hashes_of_their_own() {
        let begin = 0x9e37_79b9_7f4a_7c15_u64.to_le_bytes();
        let words = (0..20_000u32).map(|i| [&begin[..], &i.to_le_bytes()].concat());
        let hashes: HashSet<u64> = words.map(|word| Key::new(&word).hash() >> 40).collect();
        assert!(hashes.len() > 10_000, "{} places for 20,000 words", hashes.len());
    }

    proptest! {
        #[test]
        fn a_slot_gives_its_id_to_its_own_key_alone(word in "[ab\0é]{1,12}", other in "[ab\0é]{1,12}", id in 0..1u32 << BITS) {
            prop_assume!(word.len() <= TINY && other.len() <= TINY);
            let [key, another] = [&word, &other].map(|word| Key::new(word.as_bytes()));
            let slot = key.beside(id);
            prop_assert!(slot != 0);
            prop_assert_eq!(key.id_in(slot), Some(id));
            prop_assert_eq!(another.id_in(slot).is_some(), word == other);
            prop_assert_eq!(key.of_model(1).id_in(slot), None);
        }

        #[test]
        fn a_key_does_not_depend_on_what_surrounds_the_word(word in "\\PC{0,15}", before in "\\PC{0,5}", after in "\\PC{0,20}") {
            prop_assume!(word.len() <= SHORT && !word.is_empty());
            let text = format!("{before}{word}{after}");
            let alone = Key::new(word.as_bytes());
            prop_assert_eq!(Key::short(text.as_bytes(), before.len(), before.len() + word.len()), alone);
            prop_assert!(!alone.is_free() && alone != Key::long(text.repeat(16).as_bytes()));
        }
    }
}
