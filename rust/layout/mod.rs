//! From pairs of ids to the arrays of a batch, and the order in which a plan visits the pairs.

pub mod order;
pub mod pack;
pub mod pad;

use crate::error::{Error, Result};

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
    /// [`Error::Tensor`] otherwise.
    pub fn new(values: &'a [i32], offsets: &'a [i64]) -> Result<Self> {
        let ends = offsets.first() == Some(&0)
            && offsets.last() == i64::try_from(values.len()).ok().as_ref();
        if !ends || !offsets.is_sorted() {
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
        let range = || {
            let start = usize::try_from(*self.offsets.get(i)?).ok()?;
            let end = usize::try_from(*self.offsets.get(i + 1)?).ok()?;
            self.values.get(start..end)
        };
        range()
            .ok_or_else(|| Error::Tensor(format!("pair {i} is not among the {} pairs", self.len())))
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

/// The least multiple of `multiple` that is not below `n`.
///
/// # Errors
/// [`Error::Value`] if it passes `usize`.
pub fn round_up(n: usize, multiple: usize) -> Result<usize> {
    n.checked_next_multiple_of(multiple.max(1))
        .ok_or_else(|| Error::Value(format!("`pad_to_multiple_of` is too large: {multiple}")))
}
