//! What is scored: a matrix of logits, the tokens that its rows predict, and a transform.

use super::block::{CAPPED, Map, PLAIN, SCALED};
use crate::error::{Error, Result};

/// The target that means "not scored".
pub const IGNORE: i32 = -100;

/// Geometry of a matrix of logits: row `r` is `data[r * stride..][..columns]`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns: the size of the vocabulary.
    pub columns: usize,
    /// Elements from one row to the next, at least `columns`.
    pub stride: usize,
}

/// What is done to a logit before the softmax.
#[derive(Clone, Copy, Debug)]
pub struct Transform {
    /// Factor, first.
    pub logit_scale: f64,
    /// `softcap * tanh(y / softcap)`, second; 0 for none.
    pub softcap: f64,
    /// Divisor, last.
    pub temperature: f64,
}

/// The table of scored tokens: token `i` is row `logit_rows[i]` predicting `targets[i]`.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Row of each token.
    pub logit_rows: &'a [i64],
    /// Target of each token; [`IGNORE`] for one that is not scored.
    pub targets: &'a [i32],
}

/// How rows of logits are scored.
#[derive(Clone, Copy, Debug)]
pub struct Scoring<'a> {
    /// The matrix.
    pub shape: Shape,
    /// The tokens.
    pub tokens: Tokens<'a>,
    /// What is done to its logits.
    pub transform: Transform,
    /// Threads; one needs no pool.
    pub threads: usize,
}

impl Transform {
    pub(super) fn map(&self) -> Result<Map> {
        let &Self { logit_scale, softcap, temperature } = self;
        let positive = |name: &str, v: f64| {
            if v > 0.0 && v.is_finite() {
                Ok(())
            } else {
                Err(Error::Value(format!("`{name}` must be finite and above 0, found {v}")))
            }
        };
        positive("logit_scale", logit_scale)?;
        positive("temperature", temperature)?;
        if softcap == 0.0 {
            let scale = (logit_scale / temperature) as f32;
            let kind = if scale == 1.0 { PLAIN } else { SCALED };
            return Ok(Map { kind, scale, cap: 1.0 });
        }
        positive("softcap", softcap)?;
        let (scale, cap) = ((logit_scale / softcap) as f32, (softcap / temperature) as f32);
        Ok(Map { kind: CAPPED, scale, cap })
    }
}

impl Shape {
    pub(super) fn check(self, length: usize) -> Result<()> {
        let Self { rows, columns, stride } = self;
        let needed = match rows.min(columns) {
            0 => Some(0),
            _ => (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(columns)),
        };
        if (rows > 1 && stride < columns) || needed.is_none_or(|n| n > length) {
            return Err(Error::Tensor(format!(
                "`logits` of {rows} rows, {columns} columns and row stride {stride} do not fit {length} elements"
            )));
        }
        Ok(())
    }
}

impl Tokens<'_> {
    pub(super) fn check(&self) -> Result<()> {
        let (m, n) = (self.logit_rows.len(), self.targets.len());
        if m == n {
            return Ok(());
        }
        Err(Error::Tensor(format!(
            "`targets` must have shape ({m},) like `logit_rows`, found ({n},)"
        )))
    }

    /// Row and column of token `i`: `None` if it is not scored, an error if they do not exist.
    pub(super) fn place(
        &self,
        i: usize,
        shape: Shape,
    ) -> Option<std::result::Result<(usize, usize), ()>> {
        let target = self.targets[i];
        if target == IGNORE {
            return None;
        }
        let row = usize::try_from(self.logit_rows[i]).ok().filter(|&r| r < shape.rows);
        let column = usize::try_from(target).ok().filter(|&c| c < shape.columns);
        Some(row.zip(column).ok_or(()))
    }
}

/// Small rows are handed to threads in pieces of about 64 k elements.
pub(super) fn rows_a_piece(columns: usize) -> usize {
    (65_536 / columns.max(1)).max(1)
}
