//! One pair: where the prompt ends, what is cut, and whether the row stays.

mod boundary;
mod chat;
mod content;
mod factors;
mod finish;
mod forged;
mod implicit;
mod marked;
mod options;
mod outcome;
mod places;
mod prompt;
mod render;
mod strings;
mod text;
mod trained;

use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::keys::Field;
use crate::read::row::{Content, Row};
use crate::read::weights::of_ids;
use crate::tokenize::Tokenizer;
use boundary::boundary;
use finish::finish;
pub use options::{
    Boundary, EmptyThink, Images, Options, SpecialText, TrainOn, Truncation, Useless,
};
pub use outcome::{Pair, Refusal};

/// Makes what is made once for a process.
pub fn make_tables() {
    implicit::make_table();
}

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
    pair.weights = None;
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
            pair.weights = weights_of_ids(&row.weights, pair, options)?;
        }
        Content::Text(strings) => {
            let text = text::texts(strings, &row.weights, layout, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
        Content::Chat(chat) => {
            let text = chat::texts(chat, &row.weights, layout, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, pair)?;
        }
    }
    finish(pair, tokenizer, options)
}

/// The weights that a row of ids brings; a side without any weighs 1.
fn weights_of_ids(
    given: &[Option<Value<'_>>; 2],
    pair: &Pair,
    options: &Options,
) -> Result<Option<[Vec<f32>; 2]>, Bad> {
    if given.iter().all(Option::is_none) && options.train_on == TrainOn::Completion {
        return Ok(None);
    }
    let fields = [Field::ChosenWeights, Field::RejectedWeights];
    let mut weights = [vec![1.0; pair.chosen.len()], vec![1.0; pair.rejected.len()]];
    for ((value, field), weights) in given.iter().zip(fields).zip(&mut weights) {
        let name = options.keys.name(field);
        match value {
            Some(value) => *weights = of_ids(value, name, weights.len())?,
            None if options.train_on != TrainOn::Completion => {
                return Err(options.train_on.unknown(name, "ids, and no weight for each"));
            }
            None => {}
        }
    }
    Ok(Some(weights))
}
