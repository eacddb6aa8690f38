//! Sums over the tokens of each sequence.

use crate::error::{Error, Result};

const LANES: usize = 256;

/// `sum_t w_t * values_t` over `seq_offsets[s]..seq_offsets[s + 1]` for each sequence, in float64, rounded once.
///
/// Lane `l` of 256 adds tokens `l, l + 256, ...` in order, then lanes merge in a fixed binary tree: the order of
/// `cuda/segment_sum.cu`, and since the product of two float32 is exact in float64, the same bits. A weight of exactly 0
/// leaves its token out, even a NaN. Offsets that fall or leave the tokens give NaN for their sequence.
///
/// # Errors
/// [`Error::Tensor`] if `weights` has another length than `values`, or `seq_offsets` has no element.
///
/// ```
/// let sums = dpo_ext::logps::segment_sum(&[1.0, f32::NAN, 3.0], Some(&[1.0, 0.0, 2.0]), &[0, 3, 3])?;
/// assert_eq!(sums, [7.0, 0.0]);
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn segment_sum(
    values: &[f32],
    weights: Option<&[f32]>,
    seq_offsets: &[i32],
) -> Result<Vec<f32>> {
    if let Some(weights) = weights.filter(|w| w.len() != values.len()) {
        let (m, n) = (values.len(), weights.len());
        return Err(Error::Tensor(format!(
            "`weights` must have shape ({m},) like `values`, found ({n},)"
        )));
    }
    if seq_offsets.is_empty() {
        return Err(Error::Tensor("`seq_offsets` must have at least one element, found 0".into()));
    }
    let one = |pair: &[i32]| {
        let range = usize::try_from(pair[0]).ok().zip(usize::try_from(pair[1]).ok());
        match range.filter(|&(a, b)| a <= b && b <= values.len()) {
            Some((a, b)) => sum(&values[a..b], weights.map(|w| &w[a..b])),
            None => f32::NAN,
        }
    };
    Ok(seq_offsets.windows(2).map(one).collect())
}

/// The gradient of each of `tokens` log-probs from those of their sums: `w * grad[sequence]`, 0 for a weight of 0.
///
/// # Errors
/// [`Error::Tensor`] if `seq_offsets` is not from 0 to `tokens` with one border more than `grad` has sequences, or
/// `weights` has another length than `tokens`.
///
/// ```
/// let grad = dpo_ext::logps::segment_grad(&[2.0, f32::NAN], Some(&[0.5, 3.0, 0.0]), &[0, 2, 3], 3)?;
/// assert_eq!(grad, [1.0, 6.0, 0.0]);
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn segment_grad(
    grad: &[f32],
    weights: Option<&[f32]>,
    seq_offsets: &[i32],
    tokens: usize,
) -> Result<Vec<f32>> {
    let borders = seq_offsets.iter().map(|&o| usize::try_from(o).unwrap_or(usize::MAX));
    let rises = borders.clone().zip(borders.clone().skip(1)).all(|(a, b)| a <= b);
    let fits = borders.clone().next() == Some(0) && borders.clone().next_back() == Some(tokens);
    if !(rises && fits && seq_offsets.len() == grad.len() + 1) {
        let found = seq_offsets.len();
        return Err(Error::Tensor(format!(
            "`seq_offsets` must rise from 0 to {tokens} in {} steps, found {found} borders",
            grad.len()
        )));
    }
    if let Some(weights) = weights.filter(|w| w.len() != tokens) {
        let n = weights.len();
        return Err(Error::Tensor(format!("`weights` must have shape ({tokens},), found ({n},)")));
    }
    let mut spread = Vec::with_capacity(tokens);
    for (s, (first, end)) in borders.clone().zip(borders.skip(1)).enumerate() {
        match weights {
            None => spread.resize(end, grad[s]),
            Some(weights) => {
                let factor = |&w: &f32| if w == 0.0 { 0.0 } else { w * grad[s] };
                spread.extend(weights[first..end].iter().map(factor));
            }
        }
    }
    Ok(spread)
}

fn sum(values: &[f32], weights: Option<&[f32]>) -> f32 {
    let mut lanes = [0.0_f64; LANES];
    match weights {
        None => {
            for (i, &v) in values.iter().enumerate() {
                lanes[i % LANES] += f64::from(v);
            }
        }
        Some(weights) => {
            for (i, (&v, &w)) in values.iter().zip(weights).enumerate() {
                if w != 0.0 {
                    lanes[i % LANES] += f64::from(v) * f64::from(w);
                }
            }
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0] as f32
}
