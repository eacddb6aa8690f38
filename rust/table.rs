//! The score table of a batch: which row of the logits predicts which token. The shift by one happens here alone.

use crate::error::{Error, Result};

/// Rows, targets and offsets, without ignored tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Row of the flattened logits.
    pub logit_rows: Vec<i64>,
    /// The token that the row predicts.
    pub targets: Vec<i32>,
    /// Sequence `s` owns `offsets[s]..offsets[s + 1]`.
    pub offsets: Vec<i32>,
}

impl Table {
    /// An empty table.
    pub fn new() -> Self {
        Self { offsets: vec![0], ..Self::default() }
    }

    /// Adds a sequence: `completion` stands in the layout from position `start` on, behind `before` tokens of its own
    /// sequence. Without a token before it nothing predicts the first one, and it is left out.
    ///
    /// # Errors
    /// [`Error::Limit`] if the tokens of the batch pass 2^31 - 1.
    pub fn push(&mut self, start: i64, before: usize, completion: &[i32]) -> Result<()> {
        let skip = usize::from(before == 0);
        for (row, target) in (start - 1..).zip(completion).skip(skip) {
            self.logit_rows.push(row);
            self.targets.push(*target);
        }
        self.close()
    }

    /// Ends a sequence.
    fn close(&mut self) -> Result<()> {
        let end = i32::try_from(self.targets.len()).map_err(|_| Error::Limit {
            place: crate::error::Place {
                field: Some("seq_offsets".to_owned()),
                ..Default::default()
            },
            message: "a batch has more than 2^31 - 1 scored tokens".to_owned(),
        })?;
        self.offsets.push(end);
        Ok(())
    }
}
