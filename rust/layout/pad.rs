//! `padded`: one row a sequence, chosen rows first, padded on the right. TRL's collator, tensor for tensor.

use super::{Pairs, round_up};
use crate::error::{Error, Result};
use crate::table::Table;

/// The arrays of a padded batch: (2N, T) row-major, and the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// T.
    pub width: usize,
    /// Ids, and the pad id behind them.
    pub input_ids: Vec<i64>,
    /// 1 on ids.
    pub attention_mask: Vec<i64>,
    /// 1 on ids of the completion, not shifted.
    pub completion_mask: Vec<i64>,
    /// Interleaved: chosen 0, rejected 0, chosen 1, ...
    pub table: Table,
}

/// Builds the batch of the pairs `index`.
///
/// # Errors
/// [`Error::Tensor`] if a pair does not exist; [`Error::Limit`] if the table passes 32 bits.
pub fn pad(pairs: &Pairs<'_>, index: &[i64], pad_id: i64, multiple: usize) -> Result<Padded> {
    let n = index.len();
    let mut rows = Vec::with_capacity(n);
    let mut longest = 0;
    for i in index {
        let i =
            usize::try_from(*i).map_err(|_| Error::Tensor(format!("pair {i} does not exist")))?;
        let row = (pairs.prompt.get(i)?, pairs.chosen.get(i)?, pairs.rejected.get(i)?);
        longest = longest.max(row.0.len() + row.1.len().max(row.2.len()));
        rows.push(row);
    }
    let width = round_up(longest, multiple)?;
    let slots = width
        .checked_mul(2 * n)
        .ok_or_else(|| Error::Value("the batch is too large".to_owned()))?;
    let mut input_ids = vec![pad_id; slots];
    let mut attention_mask = vec![0; slots];
    let mut completion_mask = vec![0; slots];
    let mut table = Table::new();
    for (k, (prompt, chosen, rejected)) in rows.iter().enumerate() {
        for (row, completion) in [(k, chosen), (n + k, rejected)] {
            let (start, middle) = (row * width, row * width + prompt.len());
            let end = middle + completion.len();
            fill(&mut input_ids, start, prompt);
            fill(&mut input_ids, middle, completion);
            ones(&mut attention_mask, start, end);
            ones(&mut completion_mask, middle, end);
            table.push(middle as i64, prompt.len(), completion)?;
        }
    }
    Ok(Padded { width, input_ids, attention_mask, completion_mask, table })
}

fn fill(out: &mut [i64], start: usize, ids: &[i32]) {
    for (slot, id) in out.iter_mut().skip(start).zip(ids) {
        *slot = i64::from(*id);
    }
}

fn ones(out: &mut [i64], start: usize, end: usize) {
    if let Some(slots) = out.get_mut(start..end) {
        slots.fill(1);
    }
}
