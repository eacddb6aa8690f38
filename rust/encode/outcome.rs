//! What encoding gives: lists in flat arrays, and what became of every row.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Place, Reason, Warning};
use crate::pair::Pair;
use crate::read::bad::Bad;
use crate::read::cell::{Cell, Kind};
use crate::read::json::MOST_UNREAD;
use crate::read::layouts::Layout;

/// Variable-length lists in one array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ragged {
    /// All items.
    pub values: Vec<i32>,
    /// List `i` is `values[offsets[i]..offsets[i + 1]]`.
    pub offsets: Vec<i64>,
}

impl Default for Ragged {
    fn default() -> Self {
        Self { values: Vec::new(), offsets: vec![0] }
    }
}

impl Ragged {
    /// Appends a list.
    pub fn push(&mut self, items: &[i32]) {
        self.values.extend_from_slice(items);
        self.offsets.push(self.values.len() as i64);
    }

    /// Appends all lists of `other`.
    pub fn append(&mut self, other: &Self) {
        let base = self.values.len() as i64;
        self.values.extend_from_slice(&other.values);
        self.offsets.extend(other.offsets.iter().skip(1).map(|end| base + end));
    }

    /// Number of lists.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no list.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How often something happened, and where first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    /// How often.
    pub count: u64,
    /// Where first.
    pub first: Place,
    /// What was said there.
    pub message: String,
}

impl Count {
    fn add(&mut self, count: u64, first: impl FnOnce() -> (Place, String)) {
        if self.count == 0 && count > 0 {
            (self.first, self.message) = first();
        }
        self.count += count;
    }
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows seen; blank lines are none.
    pub read: u64,
    /// Rows that gave a pair.
    pub kept: u64,
    /// Dropped rows by reason, in the order of their first row.
    pub dropped: Vec<(Reason, Count)>,
    /// Kept rows with something to know.
    pub warned: BTreeMap<Warning, Count>,
    /// Kept rows by their layout.
    pub layouts: BTreeMap<Layout, u64>,
    /// Fields of kept rows that held text, or what some layout reads, and were not read; the first so many.
    pub unread: BTreeSet<String>,
}

impl Tally {
    pub(super) fn drop_row(&mut self, bad: Bad, place: Place) {
        if !self.dropped.iter().any(|(reason, _)| *reason == bad.reason) {
            self.dropped.push((bad.reason, Count::default()));
        }
        if let Some((_, count)) = self.dropped.iter_mut().find(|(reason, _)| *reason == bad.reason)
        {
            count.add(1, || (place, bad.message));
        }
    }

    /// Counts what happened `count` times, once or more.
    pub(super) fn warn(
        &mut self,
        warning: Warning,
        count: u64,
        first: impl FnOnce() -> (Place, String),
    ) {
        self.warned.entry(warning).or_default().add(count, first);
    }

    /// Notes fields that nobody read.
    pub(super) fn leave(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            if self.unread.len() < MOST_UNREAD {
                self.unread.insert(name);
            }
        }
    }

    fn append(&mut self, other: Self) {
        self.leave(other.unread);
        self.read += other.read;
        self.kept += other.kept;
        for (reason, count) in other.dropped {
            match self.dropped.iter_mut().find(|(r, _)| *r == reason) {
                Some((_, mine)) => mine.count += count.count,
                None => self.dropped.push((reason, count)),
            }
        }
        for (layout, count) in other.layouts {
            *self.layouts.entry(layout).or_default() += count;
        }
        for (warning, Count { count, first, message }) in other.warned {
            self.warn(warning, count, || (first, message));
        }
    }
}

/// The pairs of a data set.
#[derive(Debug, Default)]
pub struct Encoded {
    /// Prompts.
    pub prompt: Ragged,
    /// Preferred completions.
    pub chosen: Ragged,
    /// Other completions.
    pub rejected: Ragged,
    /// A factor for each token of `chosen` and of `rejected`; `None` as long as all are 1.
    pub weights: Option<[Vec<f32>; 2]>,
    /// Log-probs under the reference, NaN where a row has none.
    pub ref_logps: Vec<f64>,
    /// Rows that have them.
    pub with_ref: u64,
    /// 0-based number of each pair's row among the rows read.
    pub rows: Vec<i64>,
    /// The extra columns that were asked for, one value a pair.
    pub extra: Vec<Vec<Cell>>,
    /// What each of them must hold, where rows before these ones say so.
    kinds: Vec<Option<Kind>>,
    /// What became of the rows.
    pub tally: Tally,
    /// Bytes of text read.
    pub bytes: u64,
}

impl Encoded {
    /// Nothing yet, with an extra column for each of `kinds`, of that kind if it is known.
    pub fn new(kinds: Vec<Option<Kind>>) -> Self {
        Self { extra: vec![Vec::new(); kinds.len()], kinds, ..Self::default() }
    }

    /// What extra column `i` holds, if that is known.
    pub(super) fn kind(&self, i: usize) -> Option<Kind> {
        let first = || self.extra.get(i)?.first().map(Cell::kind);
        self.kinds.get(i).copied().flatten().or_else(first)
    }

    /// What each extra column holds.
    pub fn kinds(&self) -> Vec<Option<Kind>> {
        (0..self.extra.len()).map(|i| self.kind(i)).collect()
    }

    /// Whether the extra columns hold what others found in them, as far as either knows.
    pub(super) fn agrees(&self, known: &[Option<Kind>]) -> bool {
        self.kinds().iter().zip(known).all(|(a, b)| a.is_none() || b.is_none() || a == b)
    }

    pub(super) fn push(&mut self, pair: &Pair, extra: Vec<Cell>) {
        for (cells, cell) in self.extra.iter_mut().zip(extra) {
            cells.push(cell);
        }
        let weights = pair.weights.as_ref().filter(|sides| is_weighed(sides));
        self.weigh(weights, [pair.chosen.len(), pair.rejected.len()]);
        self.prompt.push(&pair.prompt);
        self.chosen.push(&pair.chosen);
        self.rejected.push(&pair.rejected);
        self.ref_logps.extend(pair.ref_logps.unwrap_or([f64::NAN; 2]));
        self.with_ref += u64::from(pair.ref_logps.is_some());
    }

    /// Appends weights of so many tokens, each 1 without `more`; before the tokens themselves.
    fn weigh(&mut self, more: Option<&[Vec<f32>; 2]>, tokens: [usize; 2]) {
        if self.weights.is_none() && more.is_none() {
            return;
        }
        let before = [&self.chosen, &self.rejected].map(|ids| ids.values.len());
        let all = self.weights.get_or_insert_with(|| before.map(|n| vec![1.0; n]));
        for (i, all) in all.iter_mut().enumerate() {
            match more {
                Some(more) => all.extend_from_slice(&more[i]),
                None => all.resize(before[i] + tokens[i], 1.0),
            }
        }
    }

    pub(super) fn append(&mut self, other: Self) {
        for (cells, more) in self.extra.iter_mut().zip(other.extra) {
            cells.extend(more);
        }
        let more = [&other.chosen, &other.rejected].map(|ids| ids.values.len());
        self.weigh(other.weights.as_ref(), more);
        let before = self.tally.read as i64;
        self.prompt.append(&other.prompt);
        self.chosen.append(&other.chosen);
        self.rejected.append(&other.rejected);
        self.ref_logps.extend(other.ref_logps);
        self.with_ref += other.with_ref;
        self.bytes += other.bytes;
        self.rows.extend(other.rows.iter().map(|row| before + row));
        self.tally.append(other.tally);
    }
}

/// Whether some weight is not 1.
fn is_weighed(sides: &[Vec<f32>; 2]) -> bool {
    sides.iter().flatten().any(|weight| weight.to_bits() != 1f32.to_bits())
}
