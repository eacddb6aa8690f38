//! `padded`: one row a sequence, chosen rows first, padded on the right. TRL's collator, tensor for tensor.

use multiversion::multiversion;

use super::table::Table;
use super::{Pairs, part, widen};
use crate::error::{Error, Result};

/// Where a padded batch is written: (2N, T) row-major.
#[derive(Debug)]
pub struct Padded<'a> {
    /// Ids, and the pad id behind them.
    pub input_ids: &'a mut [i64],
    /// 1 on ids.
    pub attention_mask: &'a mut [i64],
    /// 1 on ids of the completion, not shifted.
    pub completion_mask: &'a mut [i64],
    /// Interleaved: chosen 0, rejected 0, chosen 1, ...
    pub table: Table<'a>,
}

/// Fills the batch of the pairs `index`; the arrays' length gives T.
///
/// # Errors
/// [`Error::Tensor`] if a pair does not exist or an array is too short; [`Error::Limit`] if the table passes 32 bits.
pub fn pad_into(pairs: &Pairs<'_>, index: &[i64], pad_id: i64, out: Padded<'_>) -> Result<()> {
    let n = index.len();
    let Padded { input_ids, attention_mask, completion_mask, mut table } = out;
    let width = input_ids.len().checked_div(2 * n).unwrap_or(0);
    for (k, i) in index.iter().enumerate() {
        let pair = pairs.get(*i)?;
        for (row, completion) in [(k, pair.chosen), (n + k, pair.rejected)] {
            let (before, start) = (pair.prompt.len(), row * width);
            if before + completion.len() > width {
                return Err(Error::Tensor(format!("row {row} needs more than its {width} slots")));
            }
            let ids = part(input_ids, start, width, "input_ids")?;
            let attended = part(attention_mask, start, width, "attention_mask")?;
            let completed = part(completion_mask, start, width, "completion_mask")?;
            write(pair.prompt, completion, pad_id, [ids, attended, completed]);
            table.push(start + before, before, completion)?;
        }
    }
    table.finish()
}

/// Fills the row of a sequence in the three arrays; it fits.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn write(prompt: &[i32], completion: &[i32], pad_id: i64, row: [&mut [i64]; 3]) {
    let (before, end) = (prompt.len(), prompt.len() + completion.len());
    let [ids, attended, completed] = row;
    widen(&mut ids[..before], prompt);
    widen(&mut ids[before..end], completion);
    ids[end..].fill(pad_id);
    attended[..end].fill(1);
    attended[end..].fill(0);
    completed[..before].fill(0);
    completed[before..end].fill(1);
    completed[end..].fill(0);
}
