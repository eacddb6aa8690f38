//! From pairs of ids to the arrays of a batch, and the order in which a plan visits the pairs.

pub mod keys;
pub mod order;
pub mod pack;
pub mod pad;
pub mod share;
pub mod table;

use crate::error::{Error, Place, Result};

/// Whether somebody told long work to stop, which asks after each `STRIDE` of items.
pub type Stop<'a> = &'a dyn Fn() -> bool;

/// Items of long work between two looks at whether to go on.
const STRIDE: usize = 1 << 16;

/// Whether to go on.
fn check(stop: Stop<'_>) -> Result<()> {
    if stop() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Borrowed variable-length lists.
#[derive(Debug, Clone, Copy)]
pub struct Lists<'a> {
    values: &'a [i32],
    offsets: &'a [i64],
}

impl<'a> Lists<'a> {
    /// Lists whose offsets start at 0, never fall and end at the number of values.
    ///
    /// # Errors
    /// [`Error::Tensor`] otherwise; [`Error::Interrupted`] if `stop` says so.
    pub fn new(values: &'a [i32], offsets: &'a [i64], stop: Stop<'_>) -> Result<Self> {
        let ends = offsets.first() == Some(&0)
            && offsets.last() == i64::try_from(values.len()).ok().as_ref();
        let (mut sorted, mut last) = (true, 0);
        for part in offsets.chunks(STRIDE) {
            check(stop)?;
            sorted &= part.is_sorted() && part.first().is_none_or(|first| *first >= last);
            last = part.last().copied().unwrap_or(last);
        }
        if !ends || !sorted {
            let message = format!(
                "`offsets` must start at 0, never fall and end at the {} values",
                values.len()
            );
            return Err(Error::Tensor(message));
        }
        Ok(Self { values, offsets })
    }

    /// Lists known to be good already; [`Lists::get`] still checks what it hands out.
    pub fn trusted(values: &'a [i32], offsets: &'a [i64]) -> Self {
        Self { values, offsets }
    }

    /// Where the first value stands that is negative or not below `most`.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `stop` says so.
    pub fn outside(&self, most: i64, stop: Stop<'_>) -> Result<Option<usize>> {
        for (part, start) in self.values.chunks(STRIDE).zip((0..).step_by(STRIDE)) {
            check(stop)?;
            if let Some(at) = part.iter().position(|id| *id < 0 || i64::from(*id) >= most) {
                return Ok(Some(start + at));
            }
        }
        Ok(None)
    }

    /// Number of lists.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no list.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// List `i`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such list.
    pub fn get(&self, i: usize) -> Result<&'a [i32]> {
        self.range(i).and_then(|range| self.values.get(range)).ok_or_else(|| self.missing(i as i64))
    }

    /// The length of list `i`, from the offsets alone.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such list.
    pub fn length(&self, i: usize) -> Result<usize> {
        self.range(i)
            .and_then(|range| range.end.checked_sub(range.start))
            .ok_or_else(|| self.missing(i as i64))
    }

    /// The part of `all`, an item a value, that stands beside list `i`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such list, or `all` is too short.
    pub fn beside<'b, T>(&self, all: &'b [T], i: usize) -> Result<&'b [T]> {
        self.range(i).and_then(|range| all.get(range)).ok_or_else(|| self.missing(i as i64))
    }

    fn range(&self, i: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(*self.offsets.get(i)?).ok()?;
        let end = usize::try_from(*self.offsets.get(i.checked_add(1)?)?).ok()?;
        Some(start..end)
    }

    fn missing(&self, i: i64) -> Error {
        Error::Tensor(format!("pair {i} is not among the {} pairs", self.len()))
    }
}

/// The three lists of a data set.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    /// Prompts.
    pub prompt: Lists<'a>,
    /// Preferred completions.
    pub chosen: Lists<'a>,
    /// Other completions.
    pub rejected: Lists<'a>,
}

/// One pair.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// Prompt.
    pub prompt: &'a [i32],
    /// Preferred completion.
    pub chosen: &'a [i32],
    /// Other completion.
    pub rejected: &'a [i32],
}

impl<'a> Pairs<'a> {
    /// Pair `i`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such pair.
    pub fn get(&self, i: i64) -> Result<Pair<'a>> {
        let i = self.checked(i)?;
        Ok(Pair {
            prompt: self.prompt.get(i)?,
            chosen: self.chosen.get(i)?,
            rejected: self.rejected.get(i)?,
        })
    }

    fn checked(&self, i: i64) -> Result<usize> {
        usize::try_from(i).map_err(|_| self.prompt.missing(i))
    }

    /// What the pairs `index` need, from their lengths alone.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a pair does not exist; [`Error::Limit`] if the scored tokens pass 2^31 - 1.
    pub fn sizes(&self, index: &[i64]) -> Result<Sizes> {
        let mut sizes = Sizes::default();
        for i in index {
            let i = self.checked(*i)?;
            let (p, c, r) =
                (self.prompt.length(i)?, self.chosen.length(i)?, self.rejected.length(i)?);
            let unscored = usize::from(p == 0);
            sizes.longest = sizes.longest.max(p + c.max(r));
            sizes.scored += c.saturating_sub(unscored) + r.saturating_sub(unscored);
            sizes.prefixes += p.saturating_sub(1);
        }
        table::checked(sizes.scored)?;
        Ok(sizes)
    }
}

/// What some pairs need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens of the longest side, prompt included.
    pub longest: usize,
    /// Scored tokens of all sides.
    pub scored: usize,
    /// Tokens of all prompts but the last one of each.
    pub prefixes: usize,
}

/// A number of slots, as varlen offsets hold it.
///
/// # Errors
/// [`Error::Limit`] past 2^31 - 1.
pub fn slots(slots: usize, field: &str) -> Result<i32> {
    i32::try_from(slots).map_err(|_| Error::Limit {
        place: Place { field: Some(field.to_owned()), ..Place::default() },
        message: "a batch has more than 2^31 - 1 slots".to_owned(),
    })
}

/// The part `start..start + length` of an array of the batch.
///
/// # Errors
/// [`Error::Tensor`] if the array is too short; `name` is the array's.
fn part<'a, T>(array: &'a mut [T], start: usize, length: usize, name: &str) -> Result<&'a mut [T]> {
    let whole = array.len();
    start
        .checked_add(length)
        .and_then(|end| array.get_mut(start..end))
        .ok_or_else(|| Error::Tensor(format!("`{name}` is too short, it has {whole} places")))
}

/// Writes ids as the 64 bits that torch indexes by; both have one length.
#[inline]
fn widen(out: &mut [i64], ids: &[i32]) {
    for (slot, id) in out.iter_mut().zip(ids) {
        *slot = i64::from(*id);
    }
}

/// Writes `first`, `first + 1`, ...
fn count(out: &mut [i64], first: usize) {
    for (slot, position) in out.iter_mut().zip(first as i64..) {
        *slot = position;
    }
}

/// The pairs of row `r`: `index[bounds[r]..bounds[r + 1]]`.
///
/// # Errors
/// [`Error::Tensor`] if `bounds` does not cut `index`.
fn members<'a>(index: &'a [i64], bounds: &[i64], r: usize) -> Result<&'a [i64]> {
    let range = || {
        let start = usize::try_from(*bounds.get(r)?).ok()?;
        let end = usize::try_from(*bounds.get(r + 1)?).ok()?;
        index.get(start..end)
    };
    range().ok_or_else(|| Error::Tensor(format!("`bounds` names no pairs for row {r}")))
}
