//! Where the first text of a pair stops to count for the second, and what ends before the border between prompt and
//! completion.

/// The leading ids of a text whose bytes end at or before a border.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Inside {
    /// How many there are.
    pub ids: usize,
    /// Where the last of them ends.
    pub end: usize,
}

impl Inside {
    /// The same from the end of every id.
    pub fn of(ends: &[u32], border: usize) -> Self {
        let ids = ends.iter().take_while(|end| **end as usize <= border).count();
        Self { ids, end: ids.checked_sub(1).map_or(0, |last| ends[last] as usize) }
    }
}

/// A byte of the text, and what ends at or before it so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Border {
    pub(super) byte: usize,
    pub(super) inside: Inside,
}

impl Border {
    pub(super) fn none() -> Self {
        Self { byte: 0, inside: Inside::default() }
    }

    /// Notes that `ids` ids end at `end`; false if that is beyond the border.
    #[inline]
    pub(super) fn pass(&mut self, end: usize, ids: usize) -> bool {
        let is_inside = end <= self.byte;
        if is_inside {
            self.inside = Inside { ids, end };
        }
        is_inside
    }
}

/// A scanner's `reach` is the start of the last character it looked at (4 bytes at most), and a contraction looks one
/// byte further than the word it does not become.
const SLACK: usize = 4;

/// The last word of the first text that may be kept for the second.
#[derive(Debug)]
pub(super) struct Cut {
    open: bool,
    common: usize,
    seen: usize,
    /// Where the kept words end.
    at: usize,
    /// How many ids they have.
    ids: usize,
}

impl Cut {
    pub(super) fn none() -> Self {
        Self { open: false, common: 0, seen: 0, at: 0, ids: 0 }
    }

    pub(super) fn within(common: usize) -> Self {
        Self { open: common > 0, common, ..Self::none() }
    }

    /// End of the last kept word, and how many ids come with it.
    pub(super) fn last(&self) -> (usize, usize) {
        (self.at, self.ids)
    }

    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Keeps no later word: after an added token that stays text, a scan that starts inside it would find others.
    pub(super) fn close(&mut self) {
        self.open = false;
    }

    /// Keeps the word that ends at `end`, if the rule allows.
    #[inline]
    pub(super) fn consider(&mut self, end: usize, reach: usize, longest_added: usize, ids: usize) {
        if !self.open {
            return;
        }
        self.seen = self.seen.max(reach + SLACK);
        if self.seen + longest_added <= self.common {
            (self.at, self.ids) = (end, ids);
        } else {
            self.open = false;
        }
    }
}
