//! What becomes of a row: a pair with warnings, or a refusal.

use crate::error::{Error, Warning};
use crate::read::bad::Bad;

/// The ids of a pair, and what was noticed on the way. Its memory is reused from row to row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pair {
    /// Shared by both sides.
    pub prompt: Vec<i32>,
    /// The preferred completion.
    pub chosen: Vec<i32>,
    /// The other completion.
    pub rejected: Vec<i32>,
    /// A factor for each token of the two completions, where some are weighed.
    pub weights: Option<[Vec<f32>; 2]>,
    /// Log-probs under the reference, where the row has them.
    pub ref_logps: Option<[f64; 2]>,
    /// What is to know of it, each once.
    pub warned: Vec<Warning>,
}

impl Pair {
    pub(crate) fn has(&self, warning: Warning) -> bool {
        self.warned.contains(&warning)
    }

    pub(super) fn warn(&mut self, warning: Warning) {
        if !self.has(warning) {
            self.warned.push(warning);
        }
    }
}

/// Why a row gives no pair: it is bad, or the whole call fails.
#[derive(Debug)]
pub enum Refusal {
    /// The row is dropped, or raised with `on_bad="error"`.
    Row(Bad),
    /// The tokenizer cannot be used at all.
    Call(Error),
}

impl From<Bad> for Refusal {
    fn from(bad: Bad) -> Self {
        Self::Row(bad)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}
