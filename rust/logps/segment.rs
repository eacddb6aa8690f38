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
