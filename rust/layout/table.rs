//! The score table of a batch: which row of the logits predicts which token. The shift by one happens here alone.

use crate::error::{Error, Place, Result};

/// Where a table is written: rows, targets and offsets, without ignored tokens.
#[derive(Debug)]
pub struct Table<'a> {
    logit_rows: &'a mut [i64],
    targets: &'a mut [i32],
    offsets: &'a mut [i32],
    tokens: usize,
    sequences: usize,
}

impl<'a> Table<'a> {
    /// An empty table: `logit_rows` is to hold the row of the flattened logits of each token, `targets` the token that
    /// the row predicts, and sequence `s` is to own `offsets[s]..offsets[s + 1]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the first two differ in length.
    pub fn new(
        logit_rows: &'a mut [i64],
        targets: &'a mut [i32],
        offsets: &'a mut [i32],
    ) -> Result<Self> {
        if logit_rows.len() != targets.len() {
            return Err(Error::Tensor("`logit_rows` and `targets` differ in length".to_owned()));
        }
        if let Some(first) = offsets.first_mut() {
            *first = 0;
        }
        Ok(Self { logit_rows, targets, offsets, tokens: 0, sequences: 0 })
    }

    /// Adds a sequence: `completion` stands in the layout from position `start` on, behind `before` tokens of its own
    /// sequence. Without a token before it nothing predicts the first one, and it is left out.
    ///
    /// # Errors
    /// As [`Table::push_rows`].
    pub fn push(&mut self, start: usize, before: usize, completion: &[i32]) -> Result<()> {
        if before == 0 {
            return self.push_rows(start, completion.get(1..).unwrap_or_default());
        }
        self.push_rows(start.saturating_sub(1), completion)
    }

    /// Adds a sequence whose targets are predicted by consecutive rows, from `row` on.
    ///
    /// # Errors
    /// [`Error::Limit`] if the tokens of the batch pass 2^31 - 1; [`Error::Tensor`] if the table is full.
    pub fn push_rows(&mut self, row: usize, targets: &[i32]) -> Result<()> {
        let end = self.tokens + targets.len();
        let full = || Error::Tensor("the arrays of the score table are too short".to_owned());
        let rows = self.logit_rows.get_mut(self.tokens..end).ok_or_else(full)?;
        for (slot, row) in rows.iter_mut().zip(row as i64..) {
            *slot = row;
        }
        self.targets.get_mut(self.tokens..end).ok_or_else(full)?.copy_from_slice(targets);
        self.tokens = end;
        self.sequences += 1;
        *self.offsets.get_mut(self.sequences).ok_or_else(full)? = checked(end)?;
        Ok(())
    }

    /// Whether every place was filled, so that nothing old is left in the arrays.
    ///
    /// # Errors
    /// [`Error::Tensor`] if not.
    pub fn finish(self) -> Result<()> {
        if self.tokens != self.targets.len() || self.sequences + 1 != self.offsets.len() {
            let message = "the arrays of the score table are too long".to_owned();
            return Err(Error::Tensor(message));
        }
        Ok(())
    }
}

/// A number of scored tokens, as the offsets hold it.
///
/// # Errors
/// [`Error::Limit`] past 2^31 - 1.
pub fn checked(tokens: usize) -> Result<i32> {
    i32::try_from(tokens).map_err(|_| Error::Limit {
        place: Place { field: Some("seq_offsets".to_owned()), ..Place::default() },
        message: "a batch has more than 2^31 - 1 scored tokens".to_owned(),
    })
}
