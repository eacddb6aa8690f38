//! The Rust half of the Python package `dpo_ext`: from a file of preference pairs to ready batches, and the log-prob
//! kernels of the CPU path.
//!
//! Each module knows those before it alone: [`error`]; [`fork`]; [`pool`]; [`read`], [`bpe`], [`layout`], [`logps`] and [`loss`];
//! [`template`]; [`tokenize`]; [`pair`]; [`encode`]; `py`. `read` turns bytes into rows, `template` and `tokenize` rows
//! into text and ids, by the engine `bpe` or the `tokenizers` crate; `pair` decides one pair and `encode` a whole data
//! set; `layout` builds batches, `logps` reduces rows of logits and `loss` the log-probs of pairs. Only `py` (feature `python`) knows that Python
//! exists. `tests/package/test_rust_direction.py` holds the direction, of folders and of files.

pub mod bpe;
pub mod encode;
pub mod error;
pub mod fork;
pub mod layout;
pub mod logps;
pub mod loss;
pub mod pair;
pub mod pool;
#[cfg(feature = "python")]
mod py;
pub mod read;
pub mod template;
pub mod tokenize;

pub use error::{Error, Result};
