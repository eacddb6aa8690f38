//! How rows become pairs.

use crate::error::Reason;
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::keys::Keys;
use crate::read::layouts::Layout;
use crate::read::limits::Limits;
use crate::read::row::Rules;
use crate::template::Now;

/// What happens to a side that is longer than `max_length`. One decision a pair: both sides keep the same prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// The first `max_length` ids of each side.
    KeepStart,
    /// The last ids: the prompt is cut from the left, the same on both sides, then each completion from the left.
    KeepEnd,
    /// The prompt is cut from the left as far as needed, then completions at their end.
    KeepCompletions,
    /// The pair is dropped and counted.
    Drop,
    /// The row is bad.
    Error,
}

/// Where the prompt's ids end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Prompt and completion encoded as one text; a token across the border belongs to the completion.
    Joint,
    /// Prompt and completion encoded apart.
    Separate,
    /// TRL 1.16: the common id prefix of the prompt alone and of the joint text, the shorter one of both sides.
    Trl,
}

/// What text that spells a control token means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// The token.
    Special,
    /// Text: in contents control tokens are never tokens, so that data cannot forge a turn.
    Text,
    /// A bad row.
    Error,
}

/// What becomes of a row with a picture, a film or a sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    /// It is bad.
    Error,
    /// It is read as if it had none.
    Ignore,
}

/// What becomes of pairs that teach a preference nothing: a side is blank, or both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Useless {
    /// They are dropped and counted.
    Drop,
    /// They are kept, as TRL keeps them.
    Keep,
}

/// Where a block of thoughts belongs that a template puts before an answer without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyThink {
    /// To the answer, as the template prints it.
    Completion,
    /// To the prompt, as where thinking is turned off.
    Prompt,
}

/// Which tokens of a completion are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainOn {
    /// All of them.
    Completion,
    /// Those of the assistant's last turn.
    Last,
    /// Those of the assistant's turns, and none of what stands between them.
    Assistant,
}

impl TrainOn {
    /// The name by which Python knows it.
    fn name(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Last => "last",
            Self::Assistant => "assistant",
        }
    }

    /// The error of a side whose turns are not told apart.
    pub(super) fn unknown(self, key: &str, found: &str) -> Bad {
        let message = format!(
            "expected turns for `train_on=\"{}\"` that can be told apart, found {found}\nhint: \
             train_on=\"completion\" trains all of it; {{% generation %}} tags in a chat template say \
             what is the assistant's",
            self.name()
        );
        Bad::new(Reason::UnknownTurns, key, message)
    }
}

/// How rows become pairs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest side in tokens, `None` for no bound.
    pub max_length: Option<usize>,
    /// What happens beyond it.
    pub truncation: Truncation,
    /// Where the prompt ends.
    pub boundary: Boundary,
    /// What a spelt control token means.
    pub special_text: SpecialText,
    /// What becomes of pictures.
    pub images: Images,
    /// What becomes of blank and identical sides.
    pub useless: Useless,
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// Where an empty block of thoughts belongs.
    pub empty_think: EmptyThink,
    /// Variables of the template for all rows; a row's own win.
    pub kwargs: Vec<(String, Value<'static>)>,
    /// The layout of every row, `None` to find it for each.
    pub layout: Option<Layout>,
    /// Keys of Arrow structs that hold null are kept.
    pub keep_nulls: bool,
    /// Names of the fields.
    pub keys: Keys,
    /// Limits on input.
    pub limits: Limits,
    /// The time that templates see.
    pub now: Now,
}

impl Options {
    /// What rows are read by, with ids below `vocab`.
    pub fn rules(&self, vocab: usize) -> Rules<'_> {
        let Self { keys, limits, layout, keep_nulls, .. } = self;
        Rules { keys, limits, vocab, layout: *layout, keep_nulls: *keep_nulls }
    }
}
