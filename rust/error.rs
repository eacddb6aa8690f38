//! Every failure of this crate: a kind, a place, the numbers; the sentence comes last.

use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in the input something was found. Unknown parts are `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The file, or `None` for rows from memory.
    pub path: Option<PathBuf>,
    /// 1-based line of the unpacked text.
    pub line: Option<u64>,
    /// 1-based row of a table, of an array, or of rows from memory.
    pub row: Option<NonZeroU64>,
    /// Byte offset inside the unpacked text.
    pub byte: Option<u64>,
    /// The field, or the name of the limit that was exceeded.
    pub field: Option<String>,
}

impl Place {
    /// The line, or the row where there are no lines.
    pub fn line_or_row(&self) -> Option<u64> {
        self.line.or(self.row.map(NonZeroU64::get))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(path) = &self.path {
            write!(f, "{}", path.display())?;
            separator = ", ";
        }
        let row = self.row.map(NonZeroU64::get);
        for (unit, number) in [("line", self.line), ("row", row), ("byte", self.byte)] {
            if let Some(number) = number {
                write!(f, "{separator}{unit} {number}")?;
                separator = ", ";
            }
        }
        if let Some(field) = &self.field {
            write!(f, "{separator}`{field}`")?;
        }
        Ok(())
    }
}

/// Why a row or an input is bad: a key of the report's `dropped` for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The bytes are no UTF-8.
    BadUtf8,
    /// The line is no JSON, or spells no Unicode.
    BadJson,
    /// The row is another value than an object.
    NotAnObject,
    /// A key occurs twice.
    DuplicateKey,
    /// A field is not there.
    MissingField,
    /// A field holds a value of another kind.
    WrongType,
    /// Messages or tools are not what a template takes.
    BadMessages,
    /// Ids are no whole numbers of the vocabulary.
    BadIds,
    /// A limit is passed.
    Limit,
    /// Contents spell a control token.
    SpecialTokenInText,
    /// The chat template refuses the row.
    TemplateError,
    /// The template leaves out what a message says.
    ContentDropped,
    /// The row has a picture, a film or a sound, which nothing here carries.
    Images,
    /// The sides answer different prompts.
    DifferentPrompts,
    /// The sides share no beginning, and no field is a prompt.
    MissingPrompt,
    /// A side has no completion.
    EmptyCompletion,
    /// Both sides are the same.
    IdenticalPair,
    /// A side has no token that another one predicts.
    NoCompletionTokens,
    /// Both sides are the same once they are cut.
    IdenticalAfterTruncation,
    /// A side has more tokens than fit.
    TooLong,
    /// Weights of tokens are not what they must be.
    BadWeights,
    /// The turns that `train_on` names are not told apart.
    UnknownTurns,
    /// The input as a whole cannot be read.
    BadInput,
}

impl Reason {
    /// The name by which Python knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadUtf8 => "bad_utf8",
            Self::BadJson => "bad_json",
            Self::NotAnObject => "not_an_object",
            Self::DuplicateKey => "duplicate_key",
            Self::MissingField => "missing_field",
            Self::WrongType => "wrong_type",
            Self::BadMessages => "bad_messages",
            Self::BadIds => "bad_ids",
            Self::Limit => "limit",
            Self::SpecialTokenInText => "special_token_in_text",
            Self::TemplateError => "template_error",
            Self::ContentDropped => "content_dropped",
            Self::Images => "images",
            Self::DifferentPrompts => "different_prompts",
            Self::MissingPrompt => "missing_prompt",
            Self::EmptyCompletion => "empty_completion",
            Self::IdenticalPair => "identical_pair",
            Self::NoCompletionTokens => "no_completion_tokens",
            Self::IdenticalAfterTruncation => "identical_after_truncation",
            Self::TooLong => "too_long",
            Self::BadWeights => "bad_weights",
            Self::UnknownTurns => "unknown_turns",
            Self::BadInput => "bad_input",
        }
    }
}

/// What is counted but kept, in the order of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // each is documented where users meet it, in `dpo_ext.Report`
pub enum Warning {
    BoundaryMerge,
    Truncated,
    EosCut,
    EosAsText,
    EmptyPrompt,
    SpecialTokenInText,
    BosInText,
    NoTurnBoundary,
    TemplateFallback,
    NonFinite,
    BlankLine,
    PromptInSides,
    MessagesAsJsonText,
    ArgumentsAsText,
    ToolsDropped,
    ToolCallsDropped,
    ReasoningDropped,
    UnreadSystem,
    Images,
}

impl Warning {
    /// The name by which Python knows it: a key of the report's `warned`.
    pub fn name(self) -> &'static str {
        match self {
            Self::BoundaryMerge => "boundary_merge",
            Self::Truncated => "truncated",
            Self::EosCut => "eos_cut",
            Self::EosAsText => "eos_as_text",
            Self::EmptyPrompt => "empty_prompt",
            Self::SpecialTokenInText => "special_token_in_text",
            Self::BosInText => "bos_in_text",
            Self::NoTurnBoundary => "no_turn_boundary",
            Self::TemplateFallback => "template_fallback",
            Self::NonFinite => "non_finite",
            Self::BlankLine => "blank_line",
            Self::PromptInSides => "prompt_in_sides",
            Self::MessagesAsJsonText => "messages_as_json_text",
            Self::ArgumentsAsText => "arguments_as_text",
            Self::ToolsDropped => "tools_dropped",
            Self::ToolCallsDropped => "tool_calls_dropped",
            Self::ReasoningDropped => "reasoning_dropped",
            Self::UnreadSystem => "unread_system",
            Self::Images => "images",
        }
    }
}

/// What went wrong. `py` maps each kind to one Python exception of `dpo_ext.errors`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A row or an input is bad: `DataError`.
    Data {
        /// Where it was found.
        place: Place,
        /// Why, for a program to read.
        reason: Reason,
        /// What was expected, then what was found.
        message: String,
    },
    /// A limit was exceeded: `LimitExceeded`. `place.field` names the limit.
    Limit {
        /// Where it was found.
        place: Place,
        /// The limit and the size that was found.
        message: String,
    },
    /// The operating system refused a file: the fitting subclass of `OSError`.
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tokenizer or chat template could not be loaded or used: `TokenizerError`.
    Tokenizer(String),
    /// An array has the wrong shape, dtype or content: `TensorError`.
    Tensor(String),
    /// A bad scalar argument: `ValueError`.
    Value(String),
    /// The user pressed Ctrl-C: `KeyboardInterrupt`.
    Interrupted,
    /// A bug of ours, for example a caught panic: `DpoExtError`.
    Internal(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data { place, message, .. } | Self::Limit { place, message } => {
                if *place == Place::default() {
                    write!(f, "{message}")
                } else {
                    write!(f, "{place}: {message}")
                }
            }
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Tokenizer(message) | Self::Tensor(message) | Self::Value(message) => {
                f.write_str(message)
            }
            Self::Interrupted => f.write_str("interrupted"),
            Self::Internal(message) => {
                write!(
                    f,
                    "internal error: {message}\nhint: this is a bug in dpo_ext, please report it"
                )
            }
        }
    }
}

impl std::error::Error for Error {}
