//! NFC by the same crate as the `tokenizers` crate's, and where the normalised bytes came from.

use unicode_normalization_alignments::UnicodeNormalization;

use super::classes::{Classes, NOT_QUICK};

/// NFC of a text.
pub(crate) fn nfc(text: &str) -> String {
    text.nfc().map(|(c, _)| c).collect()
}

/// A stretch of the original that was put through the normaliser. All offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Change {
    normal_start: usize,
    normal_end: usize,
    original_end: usize,
}

/// A normalised text and the way back to the original.
#[derive(Debug, Default)]
pub(crate) struct Normalised {
    text: String,
    changes: Vec<Change>,
}

impl Normalised {
    /// NFC of `original`.
    ///
    /// Same text as [`nfc`]; only characters that are not surely in normal form, with the one before them, go through
    /// the normaliser, because every other character begins a stretch that nothing before it can change.
    pub(crate) fn set(&mut self, original: &str, classes: &Classes) {
        self.text.clear();
        self.changes.clear();
        let quick = |c: char| c.is_ascii() || classes.of(c as u32) & NOT_QUICK == 0;
        let mut copied = 0;
        let mut last_quick = 0;
        let mut chars = original.char_indices().peekable();
        while let Some((i, c)) = chars.next() {
            if quick(c) {
                last_quick = i;
                continue;
            }
            let mut end = i + c.len_utf8();
            while let Some((j, c)) = chars.next_if(|&(_, c)| !quick(c)) {
                end = j + c.len_utf8();
            }
            let start = last_quick.max(copied);
            self.text.push_str(&original[copied..start]);
            let normal_start = self.text.len();
            self.text.extend(original[start..end].nfc().map(|(c, _)| c));
            self.changes.push(Change {
                normal_start,
                normal_end: self.text.len(),
                original_end: end,
            });
            copied = end;
        }
        self.text.push_str(&original[copied..]);
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The original offset of the border `at` in the normalised text; inside a stretch that was put through the
    /// normaliser, the end of that stretch.
    pub(crate) fn original(&self, at: usize) -> usize {
        let before = self.changes.partition_point(|change| change.normal_start < at);
        match before.checked_sub(1).map(|i| self.changes[i]) {
            None => at,
            Some(change) => change.original_end + at.saturating_sub(change.normal_end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_border_maps_back_to_where_it_came_from() {
        let mut normalised = Normalised::default();
        normalised.set("abe\u{301}cd\u{1100}\u{1161}\u{11a8}!", Classes::linked().unwrap());
        assert_eq!(normalised.text(), "ab\u{e9}cd\u{ac01}!");
        let borders: Vec<usize> =
            (0..=normalised.text().len()).map(|i| normalised.original(i)).collect();
        // The combining accent ends at byte 5, the three jamo at byte 16.
        assert_eq!(borders, [0, 1, 2, 5, 5, 6, 7, 16, 16, 16, 17]);
    }

    proptest! {
        #[test]
        fn stretches_equal_the_whole(
            text in "([a-e]|[\u{300}-\u{32f}]|[\u{1100}-\u{11ff}]|[\u{ac00}-\u{ac40}]|[\u{900}-\u{9ff}]|\\PC|[\u{340}-\u{345}]|[\u{f900}-\u{f920}]){0,40}",
        ) {
            let mut normalised = Normalised::default();
            normalised.set(&text, Classes::linked().unwrap());
            prop_assert_eq!(normalised.text(), nfc(&text));
            prop_assert_eq!(normalised.original(normalised.text().len()), text.len());
        }
    }
}
