//! Hand-written scanners for the regexes of the known families: where does the next word end?
//!
//! Each is defined as equal to what the linked regex engine finds with the family's own regex text; the tests compare
//! the two. A scanner also says how far it looked, because prefix reuse (see `bpe/border.rs`) depends on it.

mod cl100k;
mod deepseek;
mod family;
mod gpt2;
mod o200k;
mod pattern;
mod scanner;
mod text;
mod word;

#[cfg(test)]
mod tests;

pub(crate) use cl100k::Cl100k;
pub(crate) use deepseek::DeepSeek;
pub use family::Family;
pub(crate) use gpt2::Gpt2;
pub(crate) use o200k::O200k;
pub(crate) use scanner::Scan;
pub(crate) use text::Text;

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
