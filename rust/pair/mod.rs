//! One pair: where the prompt ends, what is cut, and whether the row stays.

mod boundary;
mod chat;
mod finish;
mod implicit;
mod options;
mod outcome;
mod text;

use crate::error::Reason;
use crate::read::bad::Bad;
use crate::read::row::{Content, Row};
use crate::tokenize::Tokenizer;
use boundary::boundary;
use finish::finish;
pub use options::{Boundary, Options, SpecialText, Truncation};
pub use outcome::{Pair, Refusal, Warning};

/// Turns one row into the ids of `pair`, whose former content is lost.
///
/// # Errors
/// [`Refusal`]; `pair` then holds nothing of use.
pub fn encode(
    row: Row<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    pair.prompt.clear();
    pair.chosen.clear();
    pair.rejected.clear();
    pair.warned.clear();
    pair.ref_logps = row.ref_logps;
    match row.content {
        Content::Ids { prompt, chosen, rejected } => {
            for (ids, name) in [(&chosen, "chosen_ids"), (&rejected, "rejected_ids")] {
                if ids.is_empty() {
                    return Err(Bad::new(
                        Reason::EmptyCompletion,
                        name,
                        "expected at least one id, found none",
                    )
                    .into());
                }
            }
            (pair.prompt, pair.chosen, pair.rejected) = (prompt, chosen, rejected);
        }
        Content::Text(strings) => {
            let text = text::texts(strings, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
        Content::Chat(chat) => {
            let text = chat::texts(chat, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
    }
    finish(pair, tokenizer, options)
}
