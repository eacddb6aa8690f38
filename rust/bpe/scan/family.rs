//! The published pre-tokenizers and their regexes.

use super::pattern::Pattern;

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

    /// The regexes of its `Split`s in order; published files spell them so, or in other ways.
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

    /// The family whose regexes match what these do, whichever way they are spelt.
    pub(crate) fn from_regexes(regexes: &[&str]) -> Option<Self> {
        let spelt = Self::ALL.into_iter().find(|family| family.regexes() == regexes);
        spelt.or_else(|| {
            let parsed = |regexes: &[&str]| -> Option<Vec<Pattern>> {
                regexes.iter().map(|regex| Pattern::parse(regex)).collect()
            };
            let patterns = parsed(regexes)?;
            Self::ALL
                .into_iter()
                .find(|family| parsed(family.regexes()).as_ref() == Some(&patterns))
        })
    }

    /// Whether every character belongs to some alternative, so that `Removed` with `invert` equals `Isolated`.
    pub(crate) fn covers_all(self) -> bool {
        self != Self::DeepSeekV3
    }
}
