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
    /// Same text as [`nfc`]; only characters that are not surely in normal form, with the one before them if they may
    /// change it, go through the normaliser, because every other character begins a stretch that nothing before it can
    /// change.
    pub(crate) fn set(&mut self, original: &str, classes: &Classes) {
        self.text.clear();
        self.changes.clear();
        let quick = |c: char| c.is_ascii() || classes.of(c as u32) & NOT_QUICK == 0;
        // Whether nothing before a character changes it: so it is where its decomposition begins with such a one.
        let begins =
            |c: char| quick(c) || std::iter::once(c).nfd().next().is_some_and(|(c, _)| quick(c));
        // A stretch begins at `start`, and if it is not `sure` it goes through the normaliser.
        let (mut start, mut sure, mut copied) = (0, true, 0);
        for (i, c) in original.char_indices() {
            if begins(c) {
                if !sure {
                    self.stretch(original, copied, start, i);
                    copied = i;
                }
                (start, sure) = (i, true);
            }
            sure = sure && quick(c);
        }
        if !sure {
            self.stretch(original, copied, start, original.len());
            copied = original.len();
        }
        self.text.push_str(&original[copied..]);
    }

    /// Appends `original[copied..start]` as it is, and then the stretch behind it as the normaliser changes it.
    fn stretch(&mut self, original: &str, copied: usize, start: usize, end: usize) {
        self.text.push_str(&original[copied..start]);
        let stretch = &original[start..end];
        let changed = self.text.len();
        self.text.extend(stretch.nfc().map(|(c, _)| c));
        let normal = &self.text[changed..];
        if normal == stretch {
            return;
        }
        // Characters that it begins with and keeps are as sure of their place as others.
        let same = std::iter::zip(normal.chars(), stretch.chars()).take_while(|(a, b)| a == b);
        let kept: usize = same.map(|(c, _)| c.len_utf8()).sum();
        self.changes.push(Change {
            normal_start: changed + kept,
            normal_end: self.text.len(),
            original_end: end,
        });
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

    #[test]
    fn a_character_that_is_left_alone_keeps_its_place() {
        let cases = [
            // The sign of an ohm becomes a letter of the same length, and changes nothing before it.
            ("5\u{2126}", "5\u{3a9}", vec![0, 1, 4, 4]),
            (":\u{f900}\u{f901}!", ":\u{8c48}\u{66f4}!", vec![0, 1, 4, 4, 4, 7, 7, 7, 8]),
            // No letter stands for these two, and two marks change places behind a letter that stays.
            ("q\u{301}!", "q\u{301}!", vec![0, 1, 2, 3, 4]),
            ("q\u{301}\u{323}!", "q\u{323}\u{301}!", vec![0, 1, 5, 5, 5, 5, 6]),
        ];
        let mut normalised = Normalised::default();
        for (text, normal, places) in cases {
            normalised.set(text, Classes::linked().unwrap());
            assert_eq!(normalised.text(), normal);
            let found: Vec<usize> = (0..=normal.len()).map(|i| normalised.original(i)).collect();
            assert_eq!(found, places, "{text:?}");
        }
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
