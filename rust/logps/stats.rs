//! The forward pass: one read of each row.

use rayon::prelude::*;

use super::block::{self, BLOCK, CAPPED, Map, PLAIN, SCALED};
use super::element::{Element, Float32};
use super::scoring::{Scoring, rows_a_piece};
use crate::error::Result;
use crate::pool::pool;

/// What one read of a row gives. All 0 for a token that is not scored, NaN for one whose row or target does not exist.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// Log-prob of the target.
    pub logp: f32,
    /// `m`, the largest transformed logit.
    pub row_max: f32,
    /// `rest`, the sum of `exp(y - m)` over every column but the target.
    pub row_rest: f32,
    /// `log S - A / S`, `A` the sum of `exp(y - m) * (y - m)`.
    pub entropy: f32,
    /// Mean of `y` over the columns.
    pub mean_logit: f32,
    /// Log of the sum of squared probabilities.
    pub log_sum_sq: f32,
    /// Whether the target is the first column that reaches the maximum.
    pub is_top1: bool,
}

impl TokenStats {
    fn invalid() -> Self {
        let nan = f32::NAN;
        Self {
            logp: nan,
            row_max: nan,
            row_rest: nan,
            entropy: nan,
            mean_logit: nan,
            log_sum_sq: nan,
            is_top1: false,
        }
    }
}

/// Log-prob of the target of each token, what backward needs, and with `stats` four statistics of the same read.
///
/// Same as, for each scored token: `y = transform(z[row])`, `logp = log_softmax(y)[target]`, in float64.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) if the lengths disagree, [`Error::Value`](crate::Error::Value) for a bad
/// transform.
///
/// ```
/// use dpo_ext::logps::{Float32, Scoring, Shape, Tokens, Transform, token_stats};
/// let shape = Shape { rows: 1, columns: 2, stride: 2 };
/// let tokens = Tokens { logit_rows: &[0], targets: &[1] };
/// let transform = Transform { logit_scale: 1.0, softcap: 0.0, temperature: 1.0 };
/// let scoring = Scoring { shape, tokens, transform, threads: 1 };
/// let scores = token_stats::<Float32>(&[0.5, 0.5], &scoring, false)?;
/// assert!((scores[0].logp + std::f32::consts::LN_2).abs() < 1e-6);
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn token_stats<E: Element>(
    logits: &[E::Bits],
    scoring: &Scoring<'_>,
    stats: bool,
) -> Result<Vec<TokenStats>> {
    let Scoring { shape, tokens, transform, threads } = *scoring;
    let map = transform.map()?;
    shape.check(logits.len())?;
    tokens.check()?;
    let one = |i: usize| match tokens.place(i, shape) {
        None => TokenStats::default(),
        Some(Err(())) => TokenStats::invalid(),
        Some(Ok((row, target))) => {
            let z = &logits[row * shape.stride..][..shape.columns];
            match (map.kind, stats) {
                (PLAIN, false) => row_stats::<E, PLAIN, false>(z, target, map),
                (SCALED, false) => row_stats::<E, SCALED, false>(z, target, map),
                (_, false) => row_stats::<E, CAPPED, false>(z, target, map),
                (PLAIN, true) => row_stats::<E, PLAIN, true>(z, target, map),
                (SCALED, true) => row_stats::<E, SCALED, true>(z, target, map),
                (_, true) => row_stats::<E, CAPPED, true>(z, target, map),
            }
        }
    };
    let count = tokens.targets.len();
    if threads <= 1 || count <= 1 {
        return Ok((0..count).map(one).collect());
    }
    let rows_a_piece = rows_a_piece(shape.columns);
    Ok(pool(threads)?
        .install(|| (0..count).into_par_iter().with_min_len(rows_a_piece).map(one).collect()))
}

/// How far a block's maximum may lie above the shift of its sum: `exp(2)` loses 2e-7 of itself.
const LAG: f32 = 2.0;

/// The state of one read of a row; `merge` of `cuda/reduce.cuh`, where one part is a block.
struct State {
    max: f32,
    rest: f64,
    a: f64,
    q: f64,
    sum: f64,
    max_before: f32,
}

impl State {
    /// Brings the sums to the maximum of the next block. NaN sums stay NaN.
    fn raise(&mut self, max: f32) {
        if max <= self.max {
            return;
        }
        if self.max > f32::NEG_INFINITY {
            let d = f64::from(self.max) - f64::from(max);
            let k = d.exp();
            self.a = if k == 0.0 { self.a * 0.0 } else { k * (self.a + self.rest * d) };
            self.rest *= k;
            self.q *= k * k;
        }
        self.max = max;
    }

    /// Adds a block without its target. Its maximum is known only once it has been read, and rarely much above the largest
    /// so far: the sum is taken in the same read, and again where `LAG` would not bound what its exponents lose.
    fn add<E: Element>(&mut self, block: &[E::Bits], first: bool) {
        if first {
            self.raise(block::max::<E>(block));
        }
        let (max, sum) = block::max_and_sum::<E>(block, self.shift());
        if max > self.max + LAG {
            self.raise(max);
            self.rest += f64::from(block::max_and_sum::<E>(block, self.shift()).1);
        } else {
            self.rest += f64::from(sum);
            self.raise(max);
        }
    }

    /// What to subtract before exp: 0 while every column so far is -inf, where `-inf - -inf` would be NaN.
    fn shift(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }
}

fn row_stats<E: Element, const KIND: u8, const STATS: bool>(
    z: &[E::Bits],
    target: usize,
    map: Map,
) -> TokenStats {
    let mut buffer = [0.0; BLOCK];
    let mut state = State {
        max: f32::NEG_INFINITY,
        rest: 0.0,
        a: 0.0,
        q: 0.0,
        sum: 0.0,
        max_before: f32::NEG_INFINITY,
    };
    let y_target = map.apply::<KIND>(E::widen(z[target]));
    if y_target > state.max {
        state.max = y_target;
    }
    for (b, block) in z.chunks(BLOCK).enumerate() {
        let start = b * BLOCK;
        let target_here = target.checked_sub(start).filter(|&t| t < block.len());
        if KIND == PLAIN && !STATS && !E::COSTLY && target_here.is_none() {
            state.add::<E>(block, b == 0);
            continue;
        }
        let y = &mut buffer[..block.len()];
        block::load::<E, KIND>(block, map, y);
        if STATS {
            let max = block::max::<Float32>(y);
            state.raise(max);
            state.sum += f64::from(block::sum(y));
            let before = match target_here {
                Some(t) => block::max::<Float32>(&y[..t]),
                None if start < target => max,
                None => f32::NEG_INFINITY,
            };
            state.max_before = state.max_before.max(before);
        }
        if let Some(t) = target_here {
            y[t] = f32::NEG_INFINITY; // left out of the sums, whatever it holds
        }
        if STATS {
            let [s, a, q] = block::sum_stats(y, state.shift());
            state.rest += f64::from(s);
            state.a += f64::from(a);
            state.q += f64::from(q);
        } else {
            state.add::<Float32>(y, b == 0);
        }
    }
    finish::<STATS>(&state, y_target, z.len())
}

fn finish<const STATS: bool>(state: &State, y_target: f32, columns: usize) -> TokenStats {
    let d = f64::from(y_target) - f64::from(state.max);
    let e = d.exp();
    let total = state.rest + e;
    let logp = if d == 0.0 { 0.0 - state.rest.ln_1p() } else { d - total.ln() };
    let mut out = TokenStats {
        logp: logp as f32,
        row_max: state.max,
        row_rest: state.rest as f32,
        ..TokenStats::default()
    };
    if STATS {
        let a = state.a + if e == 0.0 { 0.0 } else { e * d };
        out.entropy = (total.ln() - a / total) as f32;
        out.mean_logit = ((state.sum) / columns as f64) as f32;
        out.log_sum_sq = ((state.q + e * e).ln() - 2.0 * total.ln()) as f32;
        out.is_top1 = d == 0.0 && state.max_before < y_target && !total.is_nan();
    }
    out
}
