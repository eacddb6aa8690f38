//! Masked log-probs of given logits on the CPU: the same definition as `cuda/`.
//!
//! With `y` the transformed row (`logit_scale * z`, then `softcap * tanh(y / softcap)`, then `/ temperature`), `m` its
//! maximum and `rest` the sum of `exp(y_v - m)` over every column but the target:
//!
//! ```text
//! S = rest + exp(y_t - m)
//! logp = (y_t - m) - log S,   and -log1p(rest) where y_t == m
//! d logp / d y_v = [v == t] - exp(y_v - m) / S,   for v == t as rest / S, which does not cancel
//! ```
//!
//! A row that is not scored is never read. Sums run in float32 lanes inside blocks of 2048 columns, and in float64
//! across blocks, in one fixed order: the bits of a row depend on that row, its target and the transform alone.

// Names are those of the equations; comparisons are with the exact 0, 1 and maximum.
#![allow(clippy::many_single_char_names, clippy::float_cmp)]

mod block;
mod element;
mod gradient;
mod prefetch;
mod scoring;
mod segment;
mod stats;

pub use element::{BFloat16, Element, Float16, Float32};
pub use gradient::{Saved, logits_grad, logits_grad_in_place};
pub use scoring::{IGNORE, Scoring, Shape, Tokens, Transform};
pub use segment::{segment_grad, segment_sum};
pub use stats::{TokenStats, token_stats};
