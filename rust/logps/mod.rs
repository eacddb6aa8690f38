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
mod prefetch;
mod segment;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::pool::pool;
use block::{BLOCK, CAPPED, Map, PLAIN, SCALED, Slope};
pub use element::{BFloat16, Element, Float16, Float32};
pub use segment::segment_sum;

/// The target that means "not scored".
pub const IGNORE: i32 = -100;

/// Geometry of a matrix of logits: row `r` is `data[r * stride..][..columns]`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns: the size of the vocabulary.
    pub columns: usize,
    /// Elements from one row to the next, at least `columns`.
    pub stride: usize,
}

/// What is done to a logit before the softmax.
#[derive(Clone, Copy, Debug)]
pub struct Transform {
    /// Factor, first.
    pub logit_scale: f64,
    /// `softcap * tanh(y / softcap)`, second; 0 for none.
    pub softcap: f64,
    /// Divisor, last.
    pub temperature: f64,
}

/// The table of scored tokens: token `i` is row `logit_rows[i]` predicting `targets[i]`.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Row of each token.
    pub logit_rows: &'a [i64],
    /// Target of each token; [`IGNORE`] for one that is not scored.
    pub targets: &'a [i32],
}

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

/// What the backward pass needs of each token, beside the logits.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// [`TokenStats::row_max`] of each token.
    pub row_max: &'a [f32],
    /// [`TokenStats::row_rest`] of each token.
    pub row_rest: &'a [f32],
    /// dL / dlogp of each token.
    pub grad: &'a [f32],
}

impl Transform {
    fn map(&self) -> Result<Map> {
        let &Self { logit_scale, softcap, temperature } = self;
        let positive = |name: &str, v: f64| {
            if v > 0.0 && v.is_finite() {
                Ok(())
            } else {
                Err(Error::Value(format!("`{name}` must be finite and above 0, found {v}")))
            }
        };
        positive("logit_scale", logit_scale)?;
        positive("temperature", temperature)?;
        if softcap == 0.0 {
            let scale = (logit_scale / temperature) as f32;
            let kind = if scale == 1.0 { PLAIN } else { SCALED };
            return Ok(Map { kind, scale, cap: 1.0 });
        }
        positive("softcap", softcap)?;
        let (scale, cap) = ((logit_scale / softcap) as f32, (softcap / temperature) as f32);
        Ok(Map { kind: CAPPED, scale, cap })
    }
}

impl Shape {
    fn check(self, length: usize) -> Result<()> {
        let Self { rows, columns, stride } = self;
        let needed = match rows.min(columns) {
            0 => Some(0),
            _ => (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(columns)),
        };
        if (rows > 1 && stride < columns) || needed.is_none_or(|n| n > length) {
            return Err(Error::Tensor(format!(
                "`logits` of {rows} rows, {columns} columns and row stride {stride} do not fit {length} elements"
            )));
        }
        Ok(())
    }
}

impl Tokens<'_> {
    fn check(&self) -> Result<()> {
        let (m, n) = (self.logit_rows.len(), self.targets.len());
        if m == n {
            return Ok(());
        }
        Err(Error::Tensor(format!(
            "`targets` must have shape ({m},) like `logit_rows`, found ({n},)"
        )))
    }

    /// Row and column of token `i`: `None` if it is not scored, an error if they do not exist.
    fn place(&self, i: usize, shape: Shape) -> Option<std::result::Result<(usize, usize), ()>> {
        let target = self.targets[i];
        if target == IGNORE {
            return None;
        }
        let row = usize::try_from(self.logit_rows[i]).ok().filter(|&r| r < shape.rows);
        let column = usize::try_from(target).ok().filter(|&c| c < shape.columns);
        Some(row.zip(column).ok_or(()))
    }
}

/// Log-prob of the target of each token, what backward needs, and with `stats` four statistics of the same read.
///
/// Same as, for each scored token: `y = transform(z[row])`, `logp = log_softmax(y)[target]`, in float64.
///
/// # Errors
/// [`Error::Tensor`] if the lengths disagree, [`Error::Value`] for a bad transform.
///
/// ```
/// use dpo_ext::logps::{Float32, Shape, Tokens, Transform, token_stats};
/// let shape = Shape { rows: 1, columns: 2, stride: 2 };
/// let tokens = Tokens { logit_rows: &[0], targets: &[1] };
/// let plain = Transform { logit_scale: 1.0, softcap: 0.0, temperature: 1.0 };
/// let scores = token_stats::<Float32>(&[0.5, 0.5], shape, tokens, plain, false, 1)?;
/// assert!((scores[0].logp + std::f32::consts::LN_2).abs() < 1e-6);
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn token_stats<E: Element>(
    logits: &[E::Bits],
    shape: Shape,
    tokens: Tokens<'_>,
    transform: Transform,
    stats: bool,
    threads: usize,
) -> Result<Vec<TokenStats>> {
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

/// Small rows are handed to threads in pieces of about 64 k elements.
fn rows_a_piece(columns: usize) -> usize {
    (65_536 / columns.max(1)).max(1)
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

/// The gradient of each row, into `out` of shape (rows, columns): `grad * ([v == t] - p_v) * dy/dz` for the row of a
/// scored token, exactly 0 for every other row and wherever `grad` is 0, NaN where the target does not exist.
///
/// # Errors
/// As [`token_stats`].
pub fn logits_grad<E: Element>(
    logits: &[E::Bits],
    shape: Shape,
    tokens: Tokens<'_>,
    saved: Saved<'_>,
    transform: Transform,
    out: &mut [E::Bits],
    threads: usize,
) -> Result<()> {
    let map = transform.map()?;
    shape.check(logits.len())?;
    Shape { stride: shape.columns, ..shape }.check(out.len())?;
    let owners = owners(shape, tokens, saved)?;
    let one = |(row, dz): (usize, &mut [E::Bits])| {
        let z = &logits[row * shape.stride..][..shape.columns];
        match scored(&owners, row, tokens, saved) {
            Owner::Nobody => dz.fill(E::Bits::default()),
            Owner::Invalid => dz.fill(E::narrow(f32::NAN)),
            Owner::Token(target, max, rest, g) => {
                let (slope, dz_target) = slope::<E>(map, z[target], max, rest, g);
                match map.kind {
                    PLAIN => block::gradient::<E, PLAIN>(z, slope, dz),
                    SCALED => block::gradient::<E, SCALED>(z, slope, dz),
                    _ => block::gradient::<E, CAPPED>(z, slope, dz),
                }
                dz[target] = dz_target;
            }
        }
    };
    each_row(out, shape.columns, shape, threads, one)
}

/// As [`logits_grad`], over the logits themselves; what lies between rows is left alone.
///
/// # Errors
/// As [`token_stats`].
pub fn logits_grad_in_place<E: Element>(
    logits: &mut [E::Bits],
    shape: Shape,
    tokens: Tokens<'_>,
    saved: Saved<'_>,
    transform: Transform,
    threads: usize,
) -> Result<()> {
    let map = transform.map()?;
    shape.check(logits.len())?;
    let owners = owners(shape, tokens, saved)?;
    let one = |(row, z): (usize, &mut [E::Bits])| {
        let z = &mut z[..shape.columns];
        match scored(&owners, row, tokens, saved) {
            Owner::Nobody => z.fill(E::Bits::default()),
            Owner::Invalid => z.fill(E::narrow(f32::NAN)),
            Owner::Token(target, max, rest, g) => {
                let (slope, dz_target) = slope::<E>(map, z[target], max, rest, g);
                match map.kind {
                    PLAIN => block::gradient_in_place::<E, PLAIN>(z, slope),
                    SCALED => block::gradient_in_place::<E, SCALED>(z, slope),
                    _ => block::gradient_in_place::<E, CAPPED>(z, slope),
                }
                z[target] = dz_target;
            }
        }
    };
    each_row(logits, shape.stride, shape, threads, one)
}

enum Owner {
    Nobody,
    Invalid,
    Token(usize, f32, f32, f32),
}

const NOBODY: usize = usize::MAX;
const INVALID: usize = usize::MAX - 1;

/// The token that scores each row. Of several the last one counts: tables refuse them when they are built.
fn owners(shape: Shape, tokens: Tokens<'_>, saved: Saved<'_>) -> Result<Vec<usize>> {
    tokens.check()?;
    let count = tokens.targets.len();
    for (name, found) in [
        ("row_max", saved.row_max.len()),
        ("row_rest", saved.row_rest.len()),
        ("grad", saved.grad.len()),
    ] {
        if found != count {
            return Err(Error::Tensor(format!(
                "`{name}` must have shape ({count},), found ({found},)"
            )));
        }
    }
    let mut owners = vec![NOBODY; shape.rows];
    for i in 0..count {
        let row = usize::try_from(tokens.logit_rows[i]).ok().filter(|&r| r < shape.rows);
        match (tokens.place(i, shape), row) {
            (Some(Ok((row, _))), _) => owners[row] = i,
            (Some(Err(())), Some(row)) if saved.grad[i] != 0.0 => owners[row] = INVALID,
            _ => {}
        }
    }
    Ok(owners)
}

fn scored(owners: &[usize], row: usize, tokens: Tokens<'_>, saved: Saved<'_>) -> Owner {
    match owners[row] {
        NOBODY => Owner::Nobody,
        INVALID => Owner::Invalid,
        i if saved.grad[i] == 0.0 => Owner::Nobody, // 0 * NaN is 0 here: a weight of 0 selects nothing
        i => Owner::Token(
            tokens.targets[i] as usize,
            saved.row_max[i],
            saved.row_rest[i],
            saved.grad[i],
        ),
    }
}

/// The factors of a row's gradient, and the gradient of its target.
fn slope<E: Element>(map: Map, z_target: E::Bits, max: f32, rest: f32, g: f32) -> (Slope, E::Bits) {
    let z = E::widen(z_target);
    let y = match map.kind {
        PLAIN => map.apply::<PLAIN>(z),
        SCALED => map.apply::<SCALED>(z),
        _ => map.apply::<CAPPED>(z),
    };
    let total = f64::from(rest) + (f64::from(y) - f64::from(max)).exp();
    let g = f64::from(g) * f64::from(map.scale) * f64::from(map.cap);
    let slope = Slope { map, shift: max, coefficient: (-g / total) as f32 };
    let dz = g * (f64::from(rest) / total) * f64::from(slope.inner(z));
    (slope, E::narrow(dz as f32))
}

fn each_row<T: Send>(
    data: &mut [T],
    stride: usize,
    shape: Shape,
    threads: usize,
    one: impl Fn((usize, &mut [T])) + Sync + Send,
) -> Result<()> {
    if shape.rows == 0 || shape.columns == 0 {
        return Ok(());
    }
    // A single row may come with any stride, and the slice may go on after the last row.
    let stride = if shape.rows == 1 { shape.columns } else { stride };
    let data = &mut data[..(shape.rows - 1) * stride + shape.columns];
    if threads <= 1 || shape.rows == 1 {
        data.chunks_mut(stride).enumerate().for_each(one);
    } else {
        let rows_a_piece = rows_a_piece(shape.columns);
        pool(threads)?.install(|| {
            data.par_chunks_mut(stride).enumerate().with_min_len(rows_a_piece).for_each(one);
        });
    }
    Ok(())
}
