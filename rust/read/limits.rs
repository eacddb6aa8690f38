//! The documented limits on input.

/// Sizes beyond which an input is refused. `dpo_ext.Limits` holds the defaults and says why each exists.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of one line.
    pub max_line_bytes: usize,
    /// Bytes of one rendered conversation.
    pub max_rendered_bytes: usize,
    /// Nesting of one JSON value.
    pub max_depth: usize,
    /// Keys of one JSON object.
    pub max_keys: usize,
    /// Messages of one conversation.
    pub max_messages: usize,
    /// Tokens of one sequence.
    pub max_row_tokens: usize,
    /// Unpacked bytes for one packed byte, once [`EXPANSION_GRACE`] bytes are unpacked.
    pub max_expansion: u64,
    /// Unpacked bytes of one file, `None` for no limit.
    pub max_unpacked_bytes: Option<u64>,
}

/// Unpacked bytes below which `max_expansion` is not looked at.
pub const EXPANSION_GRACE: u64 = 64 << 20;

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_line_bytes: 16 << 20,
            max_rendered_bytes: 16 << 20,
            max_depth: 64,
            max_keys: 1024,
            max_messages: 4096,
            max_row_tokens: 1 << 20,
            max_expansion: 200,
            max_unpacked_bytes: None,
        }
    }
}
