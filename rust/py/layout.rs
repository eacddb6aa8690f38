//! The arrays of a batch, and the plan of an epoch.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::detached;
use crate::encode::Ragged;
use crate::error::{Error, Place};
use crate::layout::{Lists, Pairs, order, pack, pad};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(check_ids, m)?)?;
    m.add_function(wrap_pyfunction!(pad_batch, m)?)?;
    m.add_function(wrap_pyfunction!(pack_lengths, m)?)?;
    m.add_function(wrap_pyfunction!(pack_batch, m)?)?;
    m.add_function(wrap_pyfunction!(epoch_order, m)?)?;
    m.add_function(wrap_pyfunction!(batches_by_slots, m)?)
}

pub(super) fn ragged_tuple(py: Python<'_>, ragged: Ragged) -> PyResult<Bound<'_, PyTuple>> {
    (ragged.values.into_pyarray(py), ragged.offsets.into_pyarray(py)).into_pyobject(py)
}

pub(super) type Ids<'py> = PyReadonlyArray1<'py, i32>;
pub(super) type Offsets<'py> = PyReadonlyArray1<'py, i64>;

fn lists<'a>(values: &'a Ids<'_>, offsets: &'a Offsets<'_>) -> PyResult<Lists<'a>> {
    Ok(Lists::trusted(values.as_slice()?, offsets.as_slice()?))
}

/// Checks offsets and ids that came from outside; the message names the list that is bad.
#[pyfunction]
fn check_ids(
    py: Python<'_>,
    name: String,
    values: Ids<'_>,
    offsets: Offsets<'_>,
    vocab_size: Option<i64>,
) -> PyResult<()> {
    let (values, offsets) = (values.as_slice()?, offsets.as_slice()?);
    detached(py, || {
        Lists::new(values, offsets).map_err(|e| Error::Tensor(format!("`{name}`: {e}")))?;
        let most = vocab_size.unwrap_or(i64::from(i32::MAX) + 1);
        match values.iter().position(|id| *id < 0 || i64::from(*id) >= most) {
            None => Ok(()),
            Some(at) => {
                let row = offsets.partition_point(|start| *start <= at as i64);
                let found = values.get(at).copied().unwrap_or_default();
                Err(Error::Data {
                    place: Place { line: Some(row as u64), field: Some(name), ..Place::default() },
                    reason: "bad_ids",
                    message: format!("expected token ids in 0..{most}, found {found}"),
                })
            }
        }
    })
}

/// The padded batch of `index`: ids and two masks of shape (2N, T), then the table's three arrays.
#[pyfunction]
fn pad_batch<'py>(
    py: Python<'py>,
    prompt: (Ids<'py>, Offsets<'py>),
    chosen: (Ids<'py>, Offsets<'py>),
    rejected: (Ids<'py>, Offsets<'py>),
    index: PyReadonlyArray1<'py, i64>,
    pad_id: i64,
    multiple: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let pairs = Pairs {
        prompt: lists(&prompt.0, &prompt.1)?,
        chosen: lists(&chosen.0, &chosen.1)?,
        rejected: lists(&rejected.0, &rejected.1)?,
    };
    let rows = index.len() * 2;
    let index = index.as_slice()?;
    let batch = detached(py, || pad::pad(&pairs, index, pad_id, multiple))?;
    let width = batch.width;
    let shaped = |values: Vec<i64>| values.into_pyarray(py).reshape([rows, width]);
    let table = batch.table;
    (
        shaped(batch.input_ids)?,
        shaped(batch.attention_mask)?,
        shaped(batch.completion_mask)?,
        table.logit_rows.into_pyarray(py),
        table.targets.into_pyarray(py),
        table.offsets.into_pyarray(py),
    )
        .into_pyobject(py)
}

#[pyfunction]
fn pack_lengths<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    capacity: usize,
    seed: u64,
) -> PyResult<Bound<'py, PyTuple>> {
    let lengths = lengths.as_slice()?;
    let (items, starts) = detached(py, || pack::pack_lengths(lengths, capacity, seed))?;
    (items.into_pyarray(py), starts.into_pyarray(py)).into_pyobject(py)
}

/// Packed rows: ids and positions of shape (R, T), segment offsets, the longest segment, then the table's three arrays.
#[pyfunction]
fn pack_batch<'py>(
    py: Python<'py>,
    prompt: (Ids<'py>, Offsets<'py>),
    chosen: (Ids<'py>, Offsets<'py>),
    rejected: (Ids<'py>, Offsets<'py>),
    index: PyReadonlyArray1<'py, i64>,
    bounds: PyReadonlyArray1<'py, i64>,
    width: usize,
    pad_id: i64,
    multiple: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let pairs = Pairs {
        prompt: lists(&prompt.0, &prompt.1)?,
        chosen: lists(&chosen.0, &chosen.1)?,
        rejected: lists(&rejected.0, &rejected.1)?,
    };
    let (index, bounds) = (index.as_slice()?, bounds.as_slice()?);
    let rows = bounds.len().saturating_sub(1);
    let batch = detached(py, || pack::pack(&pairs, index, bounds, width, pad_id, multiple))?;
    let width = batch.width;
    let shaped = |values: Vec<i64>| values.into_pyarray(py).reshape([rows, width]);
    let table = batch.table;
    (
        shaped(batch.input_ids)?,
        shaped(batch.position_ids)?,
        batch.cu_seq_lens.into_pyarray(py),
        batch.longest,
        table.logit_rows.into_pyarray(py),
        table.targets.into_pyarray(py),
        table.offsets.into_pyarray(py),
    )
        .into_pyobject(py)
}

#[pyfunction]
fn epoch_order(
    py: Python<'_>,
    n: u64,
    seed: u64,
    epoch: u64,
    shuffle: bool,
    start: u64,
    stop: u64,
) -> PyResult<Bound<'_, PyArray1<i64>>> {
    let order = detached(py, || Ok(order::order(n, seed, epoch, shuffle, start, stop)))?;
    Ok(order.into_pyarray(py))
}

#[pyfunction]
fn batches_by_slots<'py>(
    py: Python<'py>,
    longest: PyReadonlyArray1<'py, i64>,
    budget: u64,
    multiple: u64,
    seed: u64,
    epoch: u64,
    shuffle: bool,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let longest = longest.as_slice()?;
    let bounds = detached(py, || {
        order::by_slots(longest, budget, multiple, seed, epoch, shuffle).map_err(|(pair, slots)| Error::Data {
            place: Place::default(),
            reason: "too_long",
            message: format!(
                "pair {pair} needs {slots} slots, more than `tokens_per_batch`={budget}\nhint: use tokens_per_batch={slots} or more, or a smaller max_length"
            ),
        })
    })?;
    Ok(bounds.into_pyarray(py))
}
