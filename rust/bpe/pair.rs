//! Two texts with a common beginning, encoded with the beginning scanned once.
//!
//! The first text is encoded whole. For the second one the leading words of the first scan are kept, and the scan goes
//! on from there. Let l be the common prefix of both texts in bytes, A the longest added token in bytes, and seen(k)
//! one past the last byte that was read while deciding any word up to k, where reading the end of the text counts as
//! one past the end. Word k is kept if and only if seen(k) + A <= l.

use super::border::{Border, Cut, Inside};
use super::encode::{Keep, Scratch, Walk};
use super::model::Bpe;
use crate::error::Result;

/// The ids of two texts with a common beginning.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PairIds {
    /// Ids of the first text.
    pub first: Vec<i32>,
    /// Ids of the second text.
    pub second: Vec<i32>,
    /// What of either text lies before the border.
    pub inside: [Inside; 2],
    /// How many leading ids of the second text were taken from the first.
    pub reused: usize,
}

impl PairIds {
    /// How many leading ids both texts share whose bytes end at or before the border: the prompt of the boundary
    /// `joint`.
    pub fn joint_prompt(&self) -> usize {
        let [first, second] = self.inside.map(|inside| inside.ids);
        let most = first.min(second);
        // The reused ids are the same in both.
        let known = self.reused.min(most);
        let rest = std::iter::zip(&self.first[known..most], &self.second[known..most]);
        known + rest.take_while(|(a, b)| a == b).count()
    }
}

impl Bpe {
    /// Encodes two texts that begin alike, such as prompt + chosen and prompt + rejected, and notes how much of either
    /// ends at or before byte `border`. `out` is emptied first.
    ///
    /// Same as two calls of [`Bpe::encode_with_ends`], and [`Inside::of`]. Words of the common beginning are reused only
    /// where that is provably the same, and only if both texts are in normal form already (where the model normalises at
    /// all).
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for a text of more than [`super::encode::MAX_TEXT_BYTES`].
    pub fn encode_pair(
        &self,
        texts: [&str; 2],
        border: usize,
        keep: Keep<'_>,
        scratch: &mut Scratch,
        out: &mut PairIds,
    ) -> Result<()> {
        let [first_text, second_text] = texts;
        let PairIds { first, second, inside, reused } = out;
        first.clear();
        second.clear();
        let common = common_prefix(first_text, second_text);
        let quick = !self.nfc || self.classes.is_quick_nfc(first_text);
        let quick2 = !self.nfc || (quick && self.classes.is_quick_nfc(&second_text[common..]));
        let cut = if quick && quick2 { Cut::within(common) } else { Cut::none() };
        let border = Border { byte: border, inside: Inside::default() };
        let (ids, reused_scratch) = (&mut *first, &mut *scratch);
        let mut walk =
            Walk { bpe: self, keep, scratch: reused_scratch, ids, ends: None, cut, border };
        walk.text(first_text, 0, quick)?;
        let (at, kept) = walk.cut.last();
        inside[0] = walk.border.inside;
        second.extend_from_slice(&first[..kept]);
        *reused = kept;
        // What is kept beyond the border was looked at in the first text.
        let known = if at <= border.byte { Inside { ids: kept, end: at } } else { inside[0] };
        let (cut, border) = (Cut::none(), Border { inside: known, ..border });
        let mut walk = Walk { bpe: self, keep, scratch, ids: second, ends: None, cut, border };
        walk.text(second_text, at, quick2)?;
        inside[1] = walk.border.inside;
        Ok(())
    }
}

/// Bytes of the longest common prefix that ends between characters.
pub(crate) fn common_prefix(first: &str, second: &str) -> usize {
    const CHUNK: usize = 16;
    let (a, b) = (first.as_bytes(), second.as_bytes());
    let equal = std::iter::zip(a.chunks_exact(CHUNK), b.chunks_exact(CHUNK))
        .take_while(|(a, b)| a == b)
        .count()
        * CHUNK;
    let rest = std::iter::zip(&a[equal..], &b[equal..]).take_while(|(a, b)| a == b).count();
    let mut common = equal + rest;
    while !first.is_char_boundary(common) || !second.is_char_boundary(common) {
        common -= 1;
    }
    common
}
