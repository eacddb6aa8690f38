//! Hand-written scanners for the regexes of the known families: where does the next word end?
//!
//! Each is defined as equal to what the linked regex engine finds with the family's own regex text; the tests compare
//! the two. A scanner also says how far it looked, because prefix reuse (see [`super::pair`]) depends on it.

mod cl100k;
mod deepseek;
mod gpt2;
mod o200k;
mod text;

#[cfg(test)]
mod tests;

pub(crate) use cl100k::Cl100k;
pub(crate) use deepseek::DeepSeek;
pub(crate) use gpt2::Gpt2;
pub(crate) use o200k::O200k;
pub(crate) use text::Text;

/// A word that starts where the scan was asked to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word {
    /// One past its last byte.
    pub(crate) end: usize,
    /// Start of the furthest character that was looked at to decide `end`; the length of the text if its end was.
    pub(crate) reach: usize,
}

/// A regex, as a function from the start of a word to its end.
pub(crate) trait Scan: Copy {
    /// The word that starts at `i`. `i` is a character's start inside `text`, or the end of an earlier word.
    fn word(self, text: &Text<'_>, i: usize) -> Word;
}

/// Evaluates `$body` with `$scan` bound to the scanner of a [`Family`]: one compiled copy each.
macro_rules! with_scanner {
    ($family:expr, $scan:ident => $body:expr) => {{
        use $crate::bpe::scan::{Cl100k, DeepSeek, Family, Gpt2, O200k};
        macro_rules! run {
            ($value:expr) => {{
                let $scan = $value;
                $body
            }};
        }
        match $family {
            Family::Gpt2 => run!(Gpt2),
            Family::Llama3 => run!(Cl100k::<3, false>),
            Family::Qwen2 => run!(Cl100k::<1, false>),
            Family::Qwen35 => run!(Cl100k::<1, true>),
            Family::O200k => run!(O200k::<3, true>),
            Family::Tekken => run!(O200k::<1, false>),
            Family::DeepSeekV3 => run!(DeepSeek),
        }
    }};
}
pub(crate) use with_scanner;

/// Which published pre-tokenizer a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// GPT-2, GPT-NeoX and everything with `ByteLevel(use_regex=true)`.
    Gpt2,
    /// cl100k, Llama-3.
    Llama3,
    /// Qwen2, Qwen2.5, Qwen3.
    Qwen2,
    /// Qwen3.5.
    Qwen35,
    /// GPT-4o, gpt-oss, Llama-4.
    O200k,
    /// Mistral's tekken.
    Tekken,
    /// DeepSeek-V3 and R1.
    DeepSeekV3,
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 7] = [
        Self::Gpt2,
        Self::Llama3,
        Self::Qwen2,
        Self::Qwen35,
        Self::O200k,
        Self::Tekken,
        Self::DeepSeekV3,
    ];

    /// The regexes of its `Split`s in order, character for character as the published files have them.
    pub fn regexes(self) -> &'static [&'static str] {
        match self {
            Self::Gpt2 => {
                &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
            }
            Self::Llama3 => &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            Self::Qwen2 => &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            Self::Qwen35 => &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            Self::O200k => &[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            Self::Tekken => &[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            Self::DeepSeekV3 => &[
                r"\p{N}{1,3}",
                "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
            ],
        }
    }

    /// The family whose regexes are exactly these.
    pub(crate) fn from_regexes(regexes: &[&str]) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.regexes() == regexes)
    }

    /// Whether every character belongs to some alternative, so that `Removed` with `invert` equals `Isolated`.
    pub(crate) fn covers_all(self) -> bool {
        self != Self::DeepSeekV3
    }
}
