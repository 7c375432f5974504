//! Metadata values.

use super::read::Cursor;
use crate::error::{Error, Result};

/// Deepest nesting of arrays accepted; files in use nest none.
const MAX_DEPTH: u32 = 4;

/// A metadata value with the type the file gives it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array, stored without a tag for each element.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Reads the type and value of metadata entry `key`.
pub fn read(cursor: &mut Cursor, key: &str) -> Result<Value> {
    let what = format!("value of `{key}`");
    let what = what.as_str();
    Ok(match cursor.u32(what)? {
        0 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        1 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        2 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        3 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        4 => Value::U32(cursor.u32(what)?),
        5 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        6 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        7 => Value::Bool(truth(cursor, 1, what)?[0]),
        8 => Value::String(cursor.string(what)?.to_owned()),
        9 => Value::Array(array(cursor, what, MAX_DEPTH)?),
        10 => Value::U64(cursor.u64(what)?),
        11 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        12 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        id => return Err(unknown(cursor, id, what)),
    })
}

fn array(cursor: &mut Cursor, what: &str, depth: u32) -> Result<Array> {
    if depth == 0 {
        let at = cursor.offset();
        return Err(Error::Gguf(format!(
            "{what}: arrays nested deeper than {MAX_DEPTH} at offset {at}"
        )));
    }
    let id = cursor.u32(what)?;
    // The smallest element that this type can have, so that a count is checked before it reserves
    // memory.
    let count = cursor.count(
        if id == 9 {
            12
        } else if id == 8 {
            8
        } else {
            1
        },
        what,
    )?;
    Ok(match id {
        0 => Array::U8(cursor.scalars(count, what, u8::from_le_bytes)?),
        1 => Array::I8(cursor.scalars(count, what, i8::from_le_bytes)?),
        2 => Array::U16(cursor.scalars(count, what, u16::from_le_bytes)?),
        3 => Array::I16(cursor.scalars(count, what, i16::from_le_bytes)?),
        4 => Array::U32(cursor.scalars(count, what, u32::from_le_bytes)?),
        5 => Array::I32(cursor.scalars(count, what, i32::from_le_bytes)?),
        6 => Array::F32(cursor.scalars(count, what, f32::from_le_bytes)?),
        7 => Array::Bool(truth(cursor, count, what)?),
        8 => Array::String(many(cursor, count, |cursor| Ok(cursor.string(what)?.to_owned()))?),
        9 => Array::Array(many(cursor, count, |cursor| array(cursor, what, depth - 1))?),
        10 => Array::U64(cursor.scalars(count, what, u64::from_le_bytes)?),
        11 => Array::I64(cursor.scalars(count, what, i64::from_le_bytes)?),
        12 => Array::F64(cursor.scalars(count, what, f64::from_le_bytes)?),
        id => return Err(unknown(cursor, id, what)),
    })
}

/// `count` items, already known to fit the file, into a vector of exactly that capacity.
fn many<T>(
    cursor: &mut Cursor,
    count: u64,
    mut item: impl FnMut(&mut Cursor) -> Result<T>,
) -> Result<Vec<T>> {
    let mut items = Vec::with_capacity(count as usize);
    for _ in 0..count {
        items.push(item(cursor)?);
    }
    Ok(items)
}

fn truth(cursor: &mut Cursor, count: u64, what: &str) -> Result<Vec<bool>> {
    let at = cursor.offset();
    let bytes = cursor.take(count, what)?;
    match bytes.iter().position(|&b| b > 1) {
        None => Ok(bytes.iter().map(|&b| b == 1).collect()),
        Some(i) => {
            let (byte, at) = (bytes[i], at + i as u64);
            Err(Error::Gguf(format!("{what}: bool of {byte} at offset {at}, expected 0 or 1")))
        }
    }
}

fn unknown(cursor: &Cursor, id: u32, what: &str) -> Error {
    Error::Gguf(format!("{what}: unknown value type {id} before offset {}", cursor.offset()))
}

impl Value {
    /// The number, when it is whole and not negative.
    pub fn as_uint(&self) -> Option<u64> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::U64(n) => Some(n),
            Self::I8(n) => n.try_into().ok(),
            Self::I16(n) => n.try_into().ok(),
            Self::I32(n) => n.try_into().ok(),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// The number, when it is stored as a float.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// The truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(b) = self { Some(*b) } else { None }
    }

    /// The string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(s) = self { Some(s) } else { None }
    }

    /// The strings of an array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Self::Array(Array::String(v)) = self { Some(v) } else { None }
    }

    /// The elements of an array of i32.
    pub fn as_i32s(&self) -> Option<&[i32]> {
        if let Self::Array(Array::I32(v)) = self { Some(v) } else { None }
    }

    /// The elements of an array of f32.
    pub fn as_f32s(&self) -> Option<&[f32]> {
        if let Self::Array(Array::F32(v)) = self { Some(v) } else { None }
    }

    /// The value in an error message: scalars in full, strings and arrays by their size.
    pub fn describe(&self) -> String {
        match self {
            Self::String(s) => format!("a string of {} bytes", s.len()),
            Self::Array(_) => "an array".into(),
            scalar => format!("{scalar:?}"),
        }
    }
}
