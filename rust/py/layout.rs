//! The arrays of a batch, and the plan of an epoch.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::num::NonZeroU64;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::arrays::{Ids, Offsets, Out};
use super::wait::{detached, stoppable};
use crate::error::{Error, Place, Reason};
use crate::layout::table::Table;
use crate::layout::{Lists, Pairs, order, pack, pad, share};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(check_ids, m)?)?;
    m.add_function(wrap_pyfunction!(batch_sizes, m)?)?;
    m.add_function(wrap_pyfunction!(pad_into, m)?)?;
    m.add_function(wrap_pyfunction!(pack_lengths, m)?)?;
    m.add_function(wrap_pyfunction!(pack_into, m)?)?;
    m.add_function(wrap_pyfunction!(share_into, m)?)?;
    m.add_function(wrap_pyfunction!(blocks_into, m)?)?;
    m.add_function(wrap_pyfunction!(epoch_bins, m)?)?;
    m.add_function(wrap_pyfunction!(epoch_order, m)?)?;
    m.add_function(wrap_pyfunction!(batches_by_slots, m)?)
}

/// More items than these take so long that a signal would have to wait.
const MANY: usize = 1 << 20;

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
    stoppable(py, values.len() + offsets.len() > MANY, |stop| {
        let lists = Lists::new(values, offsets, stop).map_err(|error| match error {
            Error::Interrupted => error,
            e => Error::Tensor(format!("`{name}`: {e}")),
        })?;
        let most = vocab_size.unwrap_or(i64::from(i32::MAX) + 1);
        match lists.outside(most, stop)? {
            None => Ok(()),
            Some(at) => {
                let row = offsets.partition_point(|start| *start <= at as i64);
                let found = values.get(at).copied().unwrap_or_default();
                Err(Error::Data {
                    place: Place {
                        row: NonZeroU64::new(row as u64),
                        field: Some(name),
                        ..Place::default()
                    },
                    reason: Reason::BadIds,
                    message: format!("expected token ids in 0..{most}, found {found}"),
                })
            }
        }
    })
}

type Column<'py> = (Ids<'py>, Offsets<'py>);

/// Runs `work` on the three lists of a data set, without the GIL.
fn with_pairs<T: Send>(
    py: Python<'_>,
    columns: [&Column<'_>; 3],
    work: impl FnOnce(&Pairs<'_>) -> crate::Result<T> + Send,
) -> PyResult<T> {
    let [prompt, chosen, rejected] = columns;
    let pairs = Pairs {
        prompt: lists(&prompt.0, &prompt.1)?,
        chosen: lists(&chosen.0, &chosen.1)?,
        rejected: lists(&rejected.0, &rejected.1)?,
    };
    detached(py, || work(&pairs))
}

/// What the pairs `index` need: tokens of the longest side, scored tokens, tokens of all prefixes.
#[pyfunction]
fn batch_sizes<'py>(
    py: Python<'py>,
    prompt: Column<'py>,
    chosen: Column<'py>,
    rejected: Column<'py>,
    index: PyReadonlyArray1<'py, i64>,
) -> PyResult<(usize, usize, usize)> {
    let index = index.as_slice()?;
    let sizes = with_pairs(py, [&prompt, &chosen, &rejected], |pairs| pairs.sizes(index))?;
    Ok((sizes.longest, sizes.scored, sizes.prefixes))
}

/// Fills the padded batch of `index`; all arrays are flat.
#[pyfunction]
fn pad_into<'py>(
    py: Python<'py>,
    prompt: Column<'py>,
    chosen: Column<'py>,
    rejected: Column<'py>,
    index: PyReadonlyArray1<'py, i64>,
    pad_id: i64,
    mut input_ids: Out<'py, i64>,
    mut attention_mask: Out<'py, i64>,
    mut completion_mask: Out<'py, i64>,
    mut logit_rows: Out<'py, i64>,
    mut targets: Out<'py, i32>,
    mut seq_offsets: Out<'py, i32>,
) -> PyResult<()> {
    let index = index.as_slice()?;
    let out = pad::Padded {
        input_ids: input_ids.as_slice_mut()?,
        attention_mask: attention_mask.as_slice_mut()?,
        completion_mask: completion_mask.as_slice_mut()?,
        table: Table::new(
            logit_rows.as_slice_mut()?,
            targets.as_slice_mut()?,
            seq_offsets.as_slice_mut()?,
        )?,
    };
    with_pairs(py, [&prompt, &chosen, &rejected], |pairs| pad::pad_into(pairs, index, pad_id, out))
}

/// Fills packed rows; all arrays are flat. Returns the number of segments and the longest one.
#[pyfunction]
fn pack_into<'py>(
    py: Python<'py>,
    prompt: Column<'py>,
    chosen: Column<'py>,
    rejected: Column<'py>,
    index: PyReadonlyArray1<'py, i64>,
    bounds: PyReadonlyArray1<'py, i64>,
    pad_id: i64,
    mut input_ids: Out<'py, i64>,
    mut position_ids: Out<'py, i64>,
    mut cu_seq_lens: Out<'py, i32>,
    mut logit_rows: Out<'py, i64>,
    mut targets: Out<'py, i32>,
    mut seq_offsets: Out<'py, i32>,
) -> PyResult<(usize, usize)> {
    let (index, bounds) = (index.as_slice()?, bounds.as_slice()?);
    let out = pack::Packed {
        input_ids: input_ids.as_slice_mut()?,
        position_ids: position_ids.as_slice_mut()?,
        cu_seq_lens: cu_seq_lens.as_slice_mut()?,
        table: Table::new(
            logit_rows.as_slice_mut()?,
            targets.as_slice_mut()?,
            seq_offsets.as_slice_mut()?,
        )?,
    };
    with_pairs(py, [&prompt, &chosen, &rejected], |pairs| {
        pack::pack_into(pairs, index, bounds, pad_id, out)
    })
}

/// Fills shared rows; all arrays are flat. Returns the number of varlen segments and of keys, and the most queries and
/// keys of a segment.
#[pyfunction]
fn share_into<'py>(
    py: Python<'py>,
    prompt: Column<'py>,
    chosen: Column<'py>,
    rejected: Column<'py>,
    index: PyReadonlyArray1<'py, i64>,
    bounds: PyReadonlyArray1<'py, i64>,
    pad_id: i64,
    mut input_ids: Out<'py, i64>,
    mut position_ids: Out<'py, i64>,
    mut doc: Out<'py, i32>,
    mut seg: Out<'py, i32>,
    mut cu_seq_lens_q: Out<'py, i32>,
    mut cu_seq_lens_k: Out<'py, i32>,
    mut kv_rows: Out<'py, i64>,
    mut logit_rows: Out<'py, i64>,
    mut targets: Out<'py, i32>,
    mut seq_offsets: Out<'py, i32>,
) -> PyResult<(usize, usize, usize, usize)> {
    let (index, bounds) = (index.as_slice()?, bounds.as_slice()?);
    let out = share::Shared {
        input_ids: input_ids.as_slice_mut()?,
        position_ids: position_ids.as_slice_mut()?,
        doc: doc.as_slice_mut()?,
        seg: seg.as_slice_mut()?,
        cu_q: cu_seq_lens_q.as_slice_mut()?,
        cu_k: cu_seq_lens_k.as_slice_mut()?,
        kv_rows: kv_rows.as_slice_mut()?,
        table: Table::new(
            logit_rows.as_slice_mut()?,
            targets.as_slice_mut()?,
            seq_offsets.as_slice_mut()?,
        )?,
    };
    let written = with_pairs(py, [&prompt, &chosen, &rejected], |pairs| {
        share::share_into(pairs, index, bounds, pad_id, out)
    })?;
    Ok((written.segments, written.keys, written.longest_q, written.longest_k))
}

/// Fills the arrays of a `BlockMask` over rows of `width` slots, flat, in the order of its constructor.
#[pyfunction]
fn blocks_into<'py>(
    py: Python<'py>,
    doc: Ids<'py>,
    seg: Ids<'py>,
    width: usize,
    mut kv_num_blocks: Out<'py, i32>,
    mut kv_indices: Out<'py, i32>,
    mut full_kv_num_blocks: Out<'py, i32>,
    mut full_kv_indices: Out<'py, i32>,
    mut q_num_blocks: Out<'py, i32>,
    mut q_indices: Out<'py, i32>,
    mut full_q_num_blocks: Out<'py, i32>,
    mut full_q_indices: Out<'py, i32>,
) -> PyResult<()> {
    let (doc, seg) = (doc.as_slice()?, seg.as_slice()?);
    let keys = share::Blocks {
        partial: (kv_num_blocks.as_slice_mut()?, kv_indices.as_slice_mut()?),
        full: (full_kv_num_blocks.as_slice_mut()?, full_kv_indices.as_slice_mut()?),
    };
    let queries = share::Blocks {
        partial: (q_num_blocks.as_slice_mut()?, q_indices.as_slice_mut()?),
        full: (full_q_num_blocks.as_slice_mut()?, full_q_indices.as_slice_mut()?),
    };
    detached(py, || share::blocks_into(doc, seg, width, keys, queries))
}

#[pyfunction]
fn pack_lengths<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    capacity: usize,
    seed: u64,
) -> PyResult<Bound<'py, PyTuple>> {
    let lengths = lengths.as_slice()?;
    let (items, starts) = stoppable(py, lengths.len() > MANY, |stop| {
        pack::pack_lengths(lengths, capacity, seed, stop)
    })?;
    (items.into_pyarray(py), starts.into_pyarray(py)).into_pyobject(py)
}

/// The pairs of all bins of an epoch, and where each bin begins.
#[pyfunction]
fn epoch_bins<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    capacity: usize,
    seed: u64,
    epoch: u64,
    shuffle: bool,
) -> PyResult<Bound<'py, PyTuple>> {
    let lengths = lengths.as_slice()?;
    let epoch = order::Epoch { seed, number: epoch, shuffle };
    let (items, begins) = stoppable(py, lengths.len() > MANY, |stop| {
        pack::epoch_bins(lengths, capacity, epoch, stop)
    })?;
    (items.into_pyarray(py), begins.into_pyarray(py)).into_pyobject(py)
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
    let epoch = order::Epoch { seed, number: epoch, shuffle };
    let many = stop.min(n).saturating_sub(start) > MANY as u64;
    let order = stoppable(py, many, |told| order::order(n, epoch, start..stop, told))?;
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
    let epoch = order::Epoch { seed, number: epoch, shuffle };
    let bounds = stoppable(py, longest.len() > MANY, |stop| {
        order::by_slots(longest, budget, multiple, epoch, stop)
    })?;
    Ok(bounds.into_pyarray(py))
}
