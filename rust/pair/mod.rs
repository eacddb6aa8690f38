//! One pair: where the prompt ends, what is cut, and whether the row stays.

mod boundary;
mod chat;
mod content;
mod finish;
mod implicit;
mod marked;
mod options;
mod outcome;
mod prompt;
mod render;
mod strings;
mod text;

use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::keys::Field;
use crate::read::row::{Content, Row};
use crate::tokenize::Tokenizer;
use boundary::boundary;
use finish::finish;
pub use options::{Boundary, EmptyThink, Images, Options, SpecialText, Truncation, Useless};
pub use outcome::{Pair, Refusal};

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
    pair.warned.clone_from(&row.warned);
    pair.ref_logps = row.ref_logps;
    if let Some(field) = row.media {
        if options.images == Images::Error {
            let message = "expected text, found a picture, a film or a sound, which nothing here carries\nhint: \
                           images=\"ignore\" keeps the text of such rows";
            return Err(Bad::new(Reason::Images, field, message).into());
        }
        pair.warn(Warning::Images);
    }
    let layout = row.layout;
    match row.content {
        Content::Ids { prompt, chosen, rejected } => {
            for (ids, field) in [(&chosen, Field::ChosenIds), (&rejected, Field::RejectedIds)] {
                if ids.is_empty() {
                    return Err(Bad::new(
                        Reason::EmptyCompletion,
                        options.keys.name(field),
                        "expected at least one id, found none",
                    )
                    .into());
                }
            }
            (pair.prompt, pair.chosen, pair.rejected) = (prompt, chosen, rejected);
        }
        Content::Text(strings) => {
            let text = text::texts(strings, layout, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
        Content::Chat(chat) => {
            let text = chat::texts(chat, layout, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
    }
    finish(pair, tokenizer, options)
}
