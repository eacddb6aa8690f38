//! `NumPy` arrays of logits in, arrays out. Half-width floats come as their bits (`uint16`).

// PyO3 extracts arguments as owned values, and a kernel takes what its equation names.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use numpy::{
    Element as NumpyElement, IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyReadwriteArrayDyn,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::wait::detached;
use crate::error::Error;
use crate::logps::{
    self, BFloat16, Element, Float16, Float32, Saved, Scoring, Shape, TokenStats, Tokens, Transform,
};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(token_stats, m)?)?;
    m.add_function(wrap_pyfunction!(logits_grad, m)?)?;
    m.add_function(wrap_pyfunction!(logits_grad_, m)?)?;
    m.add_function(wrap_pyfunction!(segment_grad, m)?)?;
    m.add_function(wrap_pyfunction!(segment_sum, m)?)
}

/// (rows, columns, stride) and (logit scale, softcap, temperature), as Python passes them.
type ShapeTuple = (usize, usize, usize);
type TransformTuple = (f64, f64, f64);

fn shape((rows, columns, stride): ShapeTuple) -> Shape {
    Shape { rows, columns, stride }
}

fn transform((logit_scale, softcap, temperature): TransformTuple) -> Transform {
    Transform { logit_scale, softcap, temperature }
}

fn unknown(dtype: &str) -> PyErr {
    Error::Value(format!("`dtype` must be float32, bfloat16 or float16, found {dtype}")).into()
}

/// Calls `$body` with `$element` the type that `$dtype` names.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            "float32" => {
                type $element = Float32;
                $body
            }
            "bfloat16" => {
                type $element = BFloat16;
                $body
            }
            "float16" => {
                type $element = Float16;
                $body
            }
            other => Err(unknown(other)),
        }
    };
}

/// Weights and borders of the sequences that log-probs are added up over.
type Sums<'py> = (Option<PyReadonlyArray1<'py, f32>>, PyReadonlyArray1<'py, i32>);

/// With `sums` the first column is of sequences, not of tokens.
#[pyfunction]
#[pyo3(signature = (logits, dtype, shape_of, logit_rows, targets, transform_of, stats, threads, sums=None))]
fn token_stats<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    dtype: &str,
    shape_of: ShapeTuple,
    logit_rows: PyReadonlyArray1<'py, i64>,
    targets: PyReadonlyArray1<'py, i32>,
    transform_of: TransformTuple,
    stats: bool,
    threads: usize,
    sums: Option<Sums<'py>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let tokens = Tokens { logit_rows: logit_rows.as_slice()?, targets: targets.as_slice()? };
    let (shape, transform) = (shape(shape_of), transform(transform_of));
    let scoring = Scoring { shape, tokens, transform, threads };
    let borders = sums.as_ref().map(|(_, seq_offsets)| seq_offsets.as_slice()).transpose()?;
    let weights = sums.as_ref().and_then(|(weights, _)| weights.as_ref());
    let weights = weights.map(PyReadonlyArray1::as_slice).transpose()?;
    let (scores, sums) = with_element!(dtype, E => {
        let logits: PyReadonlyArrayDyn<'_, <E as Element>::Bits> = logits.extract()?;
        let logits = logits.as_slice()?;
        detached(py, || {
            let scores = logps::token_stats::<E>(logits, &scoring, stats)?;
            let Some(borders) = borders else { return Ok((scores, None)) };
            let logps: Vec<f32> = scores.iter().map(|s| s.logp).collect();
            let sums = logps::segment_sum(&logps, weights, borders)?;
            Ok((scores, Some(sums)))
        })
    })?;
    let kept = if stats { scores.as_slice() } else { &[] };
    let column = |of: fn(&TokenStats) -> f32, from: &[TokenStats]| array(py, from, of).into_any();
    let first = match sums {
        None => column(|s| s.logp, &scores),
        Some(sums) => sums.into_pyarray(py).into_any(),
    };
    PyTuple::new(
        py,
        [
            first,
            column(|s| s.row_max, &scores),
            column(|s| s.row_rest, &scores),
            column(|s| s.entropy, kept),
            column(|s| s.mean_logit, kept),
            column(|s| s.log_sum_sq, kept),
            array(py, kept, |s| s.is_top1).into_any(),
        ],
    )
}

fn array<'py, T: NumpyElement>(
    py: Python<'py>,
    scores: &[TokenStats],
    of: impl Fn(&TokenStats) -> T,
) -> Bound<'py, PyArray1<T>> {
    scores.iter().map(of).collect::<Vec<T>>().into_pyarray(py)
}

#[pyfunction]
fn logits_grad<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    dtype: &str,
    shape_of: ShapeTuple,
    logit_rows: PyReadonlyArray1<'py, i64>,
    targets: PyReadonlyArray1<'py, i32>,
    row_max: PyReadonlyArray1<'py, f32>,
    row_rest: PyReadonlyArray1<'py, f32>,
    grad: PyReadonlyArray1<'py, f32>,
    transform_of: TransformTuple,
    out: &Bound<'py, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let tokens = Tokens { logit_rows: logit_rows.as_slice()?, targets: targets.as_slice()? };
    let (shape, transform) = (shape(shape_of), transform(transform_of));
    let scoring = Scoring { shape, tokens, transform, threads };
    let (row_max, row_rest) = (row_max.as_slice()?, row_rest.as_slice()?);
    let saved = Saved { row_max, row_rest, grad: grad.as_slice()? };
    with_element!(dtype, E => {
        let logits: PyReadonlyArrayDyn<'_, <E as Element>::Bits> = logits.extract()?;
        let mut out: PyReadwriteArrayDyn<'_, <E as Element>::Bits> = out.extract()?;
        let (logits, out) = (logits.as_slice()?, out.as_slice_mut()?);
        detached(py, || {
            logps::logits_grad::<E>(logits, &scoring, saved, out)
        })
    })
}

#[pyfunction]
fn logits_grad_<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    dtype: &str,
    shape_of: ShapeTuple,
    logit_rows: PyReadonlyArray1<'py, i64>,
    targets: PyReadonlyArray1<'py, i32>,
    row_max: PyReadonlyArray1<'py, f32>,
    row_rest: PyReadonlyArray1<'py, f32>,
    grad: PyReadonlyArray1<'py, f32>,
    transform_of: TransformTuple,
    threads: usize,
) -> PyResult<()> {
    let tokens = Tokens { logit_rows: logit_rows.as_slice()?, targets: targets.as_slice()? };
    let (shape, transform) = (shape(shape_of), transform(transform_of));
    let scoring = Scoring { shape, tokens, transform, threads };
    let (row_max, row_rest) = (row_max.as_slice()?, row_rest.as_slice()?);
    let saved = Saved { row_max, row_rest, grad: grad.as_slice()? };
    with_element!(dtype, E => {
        let mut logits: PyReadwriteArrayDyn<'_, <E as Element>::Bits> = logits.extract()?;
        let logits = logits.as_slice_mut()?;
        detached(py, || {
            logps::logits_grad_in_place::<E>(logits, &scoring, saved)
        })
    })
}

#[pyfunction]
fn segment_sum<'py>(
    py: Python<'py>,
    values: PyReadonlyArray1<'py, f32>,
    weights: Option<PyReadonlyArray1<'py, f32>>,
    seq_offsets: PyReadonlyArray1<'py, i32>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let (values, seq_offsets) = (values.as_slice()?, seq_offsets.as_slice()?);
    let weights = weights.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let sums = detached(py, || logps::segment_sum(values, weights, seq_offsets))?;
    Ok(sums.into_pyarray(py))
}

#[pyfunction]
fn segment_grad<'py>(
    py: Python<'py>,
    grad: PyReadonlyArray1<'py, f32>,
    weights: Option<PyReadonlyArray1<'py, f32>>,
    seq_offsets: PyReadonlyArray1<'py, i32>,
    tokens: usize,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let (grad, seq_offsets) = (grad.as_slice()?, seq_offsets.as_slice()?);
    let weights = weights.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let spread = detached(py, || logps::segment_grad(grad, weights, seq_offsets, tokens))?;
    Ok(spread.into_pyarray(py))
}
