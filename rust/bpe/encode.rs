//! One text on its way through added tokens, normalisation, words and merges.

use super::added::Match;
use super::border::{Border, Cut};
use super::cache::{self, WordCache};
use super::key::{self, Key};
use super::merge::MergeScratch;
use super::model::Bpe;
use super::normal::Normalised;
use super::scan::{Scan, Text, with_scanner};

use crate::error::{Error, Place, Result};

/// Longest text in bytes: offsets inside are 32 bits wide.
pub const MAX_TEXT_BYTES: usize = i32::MAX as usize;

/// A longer normalised text gives its memory back.
const KEPT: usize = 1 << 20;

/// Reused memory of one thread, with its word cache, for any [`Bpe`] or several in turn.
#[derive(Debug, Default)]
pub struct Scratch {
    cache: WordCache,
    merge: MergeScratch,
    normalised: Normalised,
    /// Most words of the last piece were tokens. Then the vocabulary is asked before the cache, which need not learn them:
    /// that is a tenth of a first pass of prose. Where words have several tokens it would cost a third of the time.
    mostly_whole: bool,
}

/// An added token that a text spells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its first byte in the text.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// Its id.
    pub id: i32,
    /// The file's `special` flag.
    pub special: bool,
}

/// Which added tokens count as such; the others stay text.
pub type Keep<'a> = Option<&'a dyn Fn(&Found) -> bool>;

/// A [`Keep`] that leaves special tokens as text, like the `tokenizers` crate's `encode_special_tokens`.
pub fn not_special(found: &Found) -> bool {
    !found.special
}

impl Found {
    fn at(found: Match, original: impl Fn(usize) -> usize) -> Self {
        let Match { start, end, id, special } = found;
        Self { start: original(start), end: original(end), id, special }
    }
}

/// What all steps share: the model, reused memory, and where the results go.
pub(super) struct Walk<'a> {
    pub(super) bpe: &'a Bpe,
    pub(super) keep: Keep<'a>,
    pub(super) scratch: &'a mut Scratch,
    pub(super) ids: &'a mut Vec<i32>,
    pub(super) ends: Option<&'a mut Vec<u32>>,
    pub(super) cut: Cut,
    pub(super) border: Border,
}

impl Walk<'_> {
    /// Appends what `text[from..]` gives after words that end at `from`. `quick`: known to be in normal form.
    pub(super) fn text(&mut self, text: &str, from: usize, quick: bool) -> Result<()> {
        if text.len() > MAX_TEXT_BYTES {
            let message = format!("a text of {} bytes, at most {MAX_TEXT_BYTES} fit", text.len());
            let place = Place { field: Some("text".to_owned()), ..Place::default() };
            return Err(Error::Limit { place, message });
        }
        let bpe = self.bpe;
        self.scratch.cache.select(bpe.owner);
        let quick = quick || !bpe.nfc || bpe.classes.is_quick_nfc(&text[from..]);
        let mut start = from;
        if !bpe.raw.is_empty() {
            for found in bpe.raw.matches(&text.as_bytes()[from..]) {
                let found = Found::at(found, |i| from + i);
                if self.keep.is_some_and(|keep| !keep(&found)) {
                    self.cut.close();
                    continue;
                }
                self.piece(text, start, found.start, quick);
                self.added(found);
                start = found.end;
            }
        }
        self.piece(text, start, text.len(), quick);
        Ok(())
    }

    /// `text[start..end]`, which holds no raw added token.
    fn piece(&mut self, text: &str, start: usize, end: usize, quick: bool) {
        let piece = &text[start..end];
        if quick || self.bpe.classes.is_quick_nfc(piece) {
            self.normal_piece(piece, true, |i| start + i);
        } else {
            self.cut.close();
            let mut normalised = std::mem::take(&mut self.scratch.normalised);
            normalised.set(piece, self.bpe.classes);
            self.normal_piece(normalised.text(), false, |i| start + normalised.original(i));
            if normalised.text().len() <= KEPT {
                self.scratch.normalised = normalised;
            }
        }
    }

    /// Normalised text. `original` maps its offsets to the text that the caller gave; `same`: it only shifts them.
    fn normal_piece(&mut self, text: &str, same: bool, original: impl Fn(usize) -> usize) {
        let bpe = self.bpe;
        let mut start = 0;
        if !bpe.normal.is_empty() {
            for found in bpe.normal.matches(text.as_bytes()) {
                let there = Found::at(found, &original);
                if self.keep.is_some_and(|keep| !keep(&there)) {
                    self.cut.close();
                    continue;
                }
                self.words(&text[start..found.start], same, |i| original(start + i));
                self.added(there);
                start = found.end;
            }
        }
        self.words(&text[start..], same, |i| original(start + i));
    }

    fn added(&mut self, found: Found) {
        self.ids.push(found.id);
        if let Some(ends) = &mut self.ends {
            ends.push(found.end as u32);
        }
        self.cut.consider(found.end, found.end, self.bpe.longest_added, self.ids.len());
        self.border.pass(found.end, self.ids.len());
    }

    /// Normalised text without added tokens.
    fn words(&mut self, text: &str, same: bool, original: impl Fn(usize) -> usize) {
        if text.is_empty() {
            return;
        }
        let before = self.ids.len();
        let length = text.len();
        let text = Text::new(text, self.bpe.classes);
        let base = original(0);
        // Where the offsets are not the caller's, no word is known to end before the border.
        let border = if same { self.border.byte.saturating_sub(base) } else { 0 };
        let inside = with_scanner!(self.bpe.family, scan => self.scan(scan, text, base, border));
        if let Some(ends) = &mut self.ends {
            let mut at = 0;
            ends.extend(self.ids[before..].iter().map(|&id| {
                at += self.bpe.whole.bytes_of(id);
                original(at) as u32
            }));
        }
        let end = original(length);
        if end <= self.border.byte {
            self.border.pass(end, self.ids.len());
        } else if base <= self.border.byte {
            // Also of equals: a stretch that NFC changed may end here with several ids.
            let (mut at, from) = inside.unwrap_or((0, before));
            self.border.pass(original(at), from);
            for (id, count) in self.ids[from..].iter().zip(from + 1..) {
                at += self.bpe.whole.bytes_of(*id);
                if !self.border.pass(original(at), count) {
                    break;
                }
            }
        }
    }

    /// The ids of all words. Returns where the last word that ends at or before `border` ends, and how many ids there
    /// are then.
    #[inline(never)]
    fn scan<S: Scan>(
        &mut self,
        scan: S,
        text: Text<'_>,
        base: usize,
        border: usize,
    ) -> Option<(usize, usize)> {
        // Tried: scanning 8, 16 or 32 words ahead of their look-ups, so that cache misses overlap; 5 to 10 % slower.
        let mut i = 0;
        let mut inside = None;
        let (mut words, before) = (0, self.ids.len());
        while i < text.len() {
            words += 1;
            let word = scan.word(&text, i);
            self.word(text.bytes(), i, word.end);
            if self.cut.is_open() {
                let reach = base + word.reach;
                let longest = self.bpe.longest_added;
                self.cut.consider(base + word.end, reach, longest, self.ids.len());
            }
            if word.end <= border {
                inside = Some((word.end, self.ids.len()));
            }
            i = word.end;
        }
        self.scratch.mostly_whole = 5 * (self.ids.len() - before) < 6 * words;
        inside
    }

    #[inline]
    fn word(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start > key::SHORT {
            return self.long_word(&text[start..end]);
        }
        if end - start == 1 {
            return self.ids.push(self.bpe.merges.byte_id(text[start]) as i32);
        }
        let key = Key::short(text, start, end);
        if self.scratch.mostly_whole
            && end - start <= key::TINY
            && let Some(id) = self.bpe.whole.find_tiny(key)
        {
            return self.ids.push(id);
        }
        if !self.scratch.cache.get_short(key, self.ids) {
            let before = self.ids.len();
            self.new_word(key, &text[start..end]);
            self.scratch.cache.put_short(key, &self.ids[before..]);
        }
    }

    fn long_word(&mut self, word: &[u8]) {
        let key = Key::long(word);
        if word.len() > cache::LONG {
            self.new_word(key, word);
        } else if !self.scratch.cache.get_long(key, word, self.ids) {
            let before = self.ids.len();
            self.new_word(key, word);
            self.scratch.cache.put_long(key, word, &self.ids[before..]);
        }
    }

    #[cold]
    fn new_word(&mut self, key: Key, word: &[u8]) {
        match self.bpe.whole.find(key, word) {
            Some(id) => self.ids.push(id),
            None => self.bpe.merges.encode(word, &mut self.scratch.merge, self.ids),
        }
    }
}

impl Bpe {
    /// Appends the ids of `text` to `ids`, without those of the post-processor.
    ///
    /// Same as `tokenizers::Tokenizer::encode_fast(text, false)`; with `keep = Some(&not_special)`, as after
    /// `set_encode_special_tokens(true)`.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for more than [`MAX_TEXT_BYTES`].
    pub fn encode_into(
        &self,
        text: &str,
        keep: Keep<'_>,
        scratch: &mut Scratch,
        ids: &mut Vec<i32>,
    ) -> Result<()> {
        let (cut, border) = (Cut::none(), Border::none());
        Walk { bpe: self, keep, scratch, ids, ends: None, cut, border }.text(text, 0, false)
    }

    /// Whether the normaliser changes nothing in a text, as far as a quick look tells.
    pub fn leaves(&self, text: &str) -> bool {
        !self.nfc || self.classes.is_quick_nfc(text)
    }

    /// [`Self::encode_into`], and for each id the end of its bytes in `text`.
    ///
    /// Where NFC changed the text, an id that ends inside a changed character gets that character's end.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for more than [`MAX_TEXT_BYTES`].
    pub fn encode_with_ends(
        &self,
        text: &str,
        keep: Keep<'_>,
        scratch: &mut Scratch,
        ids: &mut Vec<i32>,
        ends: &mut Vec<u32>,
    ) -> Result<()> {
        let (ends, cut, border) = (Some(ends), Cut::none(), Border::none());
        Walk { bpe: self, keep, scratch, ids, ends, cut, border }.text(text, 0, false)
    }
}
