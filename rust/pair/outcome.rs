//! What becomes of a row: a pair with warnings, or a refusal.

use crate::error::Error;
use crate::read::bad::Bad;

/// What is counted but kept; the index into a report's `warned`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each is documented where users meet it, in `dpo_ext.Report`
pub enum Warning {
    BoundaryMerge,
    Truncated,
    EosCut,
    EmptyPrompt,
    SpecialTokenInText,
    BosInText,
    NoTurnBoundary,
    TemplateFallback,
    BlankLine,
}

/// The names of the warnings, in the order of [`Warning`].
pub const WARNINGS: [&str; 9] = [
    "boundary_merge",
    "truncated",
    "eos_cut",
    "empty_prompt",
    "special_token_in_text",
    "bos_in_text",
    "no_turn_boundary",
    "template_fallback",
    "blank_line",
];

/// The ids of a pair, and what was noticed on the way. Its memory is reused from row to row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pair {
    /// Shared by both sides.
    pub prompt: Vec<i32>,
    /// The preferred completion.
    pub chosen: Vec<i32>,
    /// The other completion.
    pub rejected: Vec<i32>,
    /// Log-probs under the reference, where the row has them.
    pub ref_logps: Option<[f64; 2]>,
    /// Set bits are [`Warning`]s.
    pub warned: u32,
}

impl Pair {
    pub(super) fn has(&self, warning: Warning) -> bool {
        self.warned & 1 << warning as u32 != 0
    }

    pub(super) fn warn(&mut self, warning: Warning) {
        self.warned |= 1 << warning as u32;
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
