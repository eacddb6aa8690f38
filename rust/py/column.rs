//! Arrow columns as Python describes them: tuples over a list of byte buffers.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::read::column::{Column, Data, Offsets};

/// The column of `(kind, len, offset, validity, *rest)`, in which a buffer is its number in `buffers`.
pub(super) fn column<'a>(node: &Bound<'_, PyTuple>, buffers: &[&'a [u8]]) -> PyResult<Column<'a>> {
    let get = |i: usize| node.get_item(i);
    let buffer = |i: usize| -> PyResult<&'a [u8]> {
        let number: usize = get(i)?.extract()?;
        buffers.get(number).copied().ok_or_else(|| PyValueError::new_err("no such buffer"))
    };
    let number = |i: usize| -> PyResult<usize> { get(i)?.extract() };
    let flag = |i: usize| -> PyResult<bool> { get(i)?.extract() };
    let text = |i: usize| -> PyResult<String> { get(i)?.extract() };
    let child = |i: usize| column(get(i)?.cast::<PyTuple>()?, buffers);
    let offsets = |i: usize| -> PyResult<Offsets<'a>> {
        Ok(Offsets { bytes: buffer(i)?, wide: flag(i + 1)?, base: number(i + 2)? })
    };
    let validity = if get(3)?.is_none() { None } else { Some(buffer(3)?) };
    let data = match text(0)?.as_str() {
        "null" => Data::Null,
        "bool" => Data::Bool(buffer(4)?),
        "int" => Data::Int { bytes: buffer(4)?, width: number(5)?, signed: flag(6)? },
        "float" => Data::Float { bytes: buffer(4)?, width: number(5)? },
        "text" => Data::Text { offsets: offsets(4)?, bytes: buffer(7)?, is_json: flag(8)? },
        "list" => Data::List { offsets: offsets(4)?, items: Box::new(child(7)?) },
        "fixed" => Data::Fixed { size: number(4)?, items: Box::new(child(5)?) },
        "struct" => {
            let names: Vec<String> = get(4)?.extract()?;
            let fields = names.into_iter().enumerate();
            let fields = fields.map(|(i, name)| Ok((name, child(5 + i)?)));
            Data::Struct(fields.collect::<PyResult<_>>()?)
        }
        "map" => Data::Map {
            offsets: offsets(4)?,
            keys: Box::new(child(7)?),
            values: Box::new(child(8)?),
        },
        "other" => Data::Other(text(4)?),
        kind => return Err(PyValueError::new_err(format!("unknown kind of column {kind:?}"))),
    };
    Ok(Column { len: number(1)?, offset: number(2)?, validity, data })
}
