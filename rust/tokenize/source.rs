//! What a tokenizer is made of.

/// A token that a folder adds to those of `tokenizer.json`, or gives other flags.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // the flags of the file format
pub struct Added {
    /// Its text.
    pub content: String,
    /// Takes white space on its left along.
    pub lstrip: bool,
    /// Takes white space on its right along.
    pub rstrip: bool,
    /// Only between word borders.
    pub single_word: bool,
    /// Searched in normalised text.
    pub normalized: bool,
    /// A control token.
    pub special: bool,
}

/// What a tokenizer is made of.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The text of `tokenizer.json`.
    pub json: String,
    /// `bos_token`, `eos_token`, ... as templates know them.
    pub named: Vec<(String, String)>,
    /// Tokens beside those of `json`, in order; one that is there takes these flags.
    pub added: Vec<Added>,
    /// Whether text that spells a special token stays text.
    pub split_special: bool,
    /// Ids that win over the named tokens.
    pub ids: [Option<u32>; 3],
    /// The chat template.
    pub template: Option<String>,
    /// The chat template of conversations with tools, where that is another one.
    pub tool_template: Option<String>,
}
