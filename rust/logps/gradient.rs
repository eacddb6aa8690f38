//! The backward pass: the gradient of each row.

use rayon::prelude::*;

use super::block::{self, CAPPED, Map, PLAIN, SCALED, Slope};
use super::element::{Element, plain_nan};
use super::scoring::{Scoring, Shape, Tokens, rows_a_piece};
use crate::error::{Error, Result};
use crate::pool::pool;

/// What the backward pass needs of each token, beside the logits.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// [`TokenStats::row_max`](super::TokenStats::row_max) of each token.
    pub row_max: &'a [f32],
    /// [`TokenStats::row_rest`](super::TokenStats::row_rest) of each token.
    pub row_rest: &'a [f32],
    /// dL / dlogp of each token.
    pub grad: &'a [f32],
}

/// The gradient of each row, into `out` of shape (rows, columns): `grad * ([v == t] - p_v) * dy/dz` for the row of a
/// scored token, exactly 0 for every other row and wherever `grad` is 0, NaN where the target does not exist.
///
/// # Errors
/// As [`token_stats`](super::token_stats).
pub fn logits_grad<E: Element>(
    logits: &[E::Bits],
    scoring: &Scoring<'_>,
    saved: Saved<'_>,
    out: &mut [E::Bits],
) -> Result<()> {
    let Scoring { shape, tokens, transform, threads } = *scoring;
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
/// As [`token_stats`](super::token_stats).
pub fn logits_grad_in_place<E: Element>(
    logits: &mut [E::Bits],
    scoring: &Scoring<'_>,
    saved: Saved<'_>,
) -> Result<()> {
    let Scoring { shape, tokens, transform, threads } = *scoring;
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
    let slope = Slope { map, shift: plain_nan(max), coefficient: plain_nan((-g / total) as f32) };
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
