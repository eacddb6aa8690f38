//! The Rust half of the Python package `dpo_ext`: from a file of preference pairs to ready batches, and the log-prob
//! kernels of the CPU path.
//!
//! Modules in the order of their dependencies: [`error`] and [`pool`] know nobody; `read`, `template` and `tokenize`
//! turn bytes into rows, text and ids; `pair` decides one pair; `layout` builds batches; [`logps`] reduces
//! rows of logits. Only `py` (feature `python`) knows that Python exists.

pub mod bpe;
pub mod encode;
pub mod error;
pub mod layout;
pub mod logps;
pub mod pair;
pub mod pool;
#[cfg(feature = "python")]
mod py;
pub mod read;
pub mod template;
pub mod tokenize;

pub use error::{Error, Result};
