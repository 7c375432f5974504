//! The GGUF reader against a writer, truncation and corruption.

mod support;

use kvwarp_engine::gguf::{self, Array, GgmlType, Value};
use proptest::prelude::*;
use support::{Meta, Tensor};

fn key() -> impl Strategy<Value = String> {
    "[a-z]{1,6}(\\.[a-zé]{1,5}){0,2}"
}

fn value() -> impl Strategy<Value = Meta> {
    prop_oneof![
        any::<u32>().prop_map(Meta::U32),
        (-1e30f32..1e30).prop_map(Meta::F32),
        any::<bool>().prop_map(Meta::Bool),
        ".{0,20}".prop_map(Meta::Text),
        prop::collection::vec(".{0,6}", 0..8).prop_map(Meta::Texts),
        prop::collection::vec(any::<i32>(), 0..8).prop_map(Meta::I32s),
        prop::collection::vec(-1f32..1.0, 0..8).prop_map(Meta::F32s),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..4)
            .prop_map(Meta::Nested),
    ]
}

/// Tensors of F32 and Q4_1 with random extents and data.
fn tensor() -> impl Strategy<Value = (Vec<u64>, u32)> {
    (prop::collection::vec(1u64..5, 1..5), any::<bool>()).prop_map(|(mut shape, packed)| {
        shape[0] *= if packed { 32 } else { 1 };
        (shape, if packed { 3 } else { 0 })
    })
}

type Entries = Vec<(String, Meta)>;

fn file() -> impl Strategy<Value = (Entries, Vec<Tensor>)> {
    let metadata = prop::collection::btree_map(key(), value(), 0..8);
    let tensors = prop::collection::btree_map(key(), tensor(), 0..5);
    (metadata, tensors, 3u32..8).prop_map(|(metadata, tensors, log)| {
        let mut metadata: Entries = metadata.into_iter().collect();
        metadata.push(("general.alignment".into(), Meta::U32(1 << log)));
        let fill = |(i, (name, (shape, kind))): (usize, (String, (Vec<u64>, u32)))| {
            let elements = shape.iter().product::<u64>() as usize;
            let bytes = if kind == 3 { elements / 32 * 20 } else { elements * 4 };
            Tensor { name, shape, kind, data: vec![i as u8 + 1; bytes] }
        };
        (metadata, tensors.into_iter().enumerate().map(fill).collect())
    })
}

fn same(read: &Value, written: &Meta) -> bool {
    match (read, written) {
        (Value::U32(a), Meta::U32(b)) => a == b,
        (Value::F32(a), Meta::F32(b)) => a == b,
        (Value::Bool(a), Meta::Bool(b)) => a == b,
        (Value::String(a), Meta::Text(b)) => a == b,
        (Value::Array(Array::String(a)), Meta::Texts(b)) => a == b,
        (Value::Array(Array::I32(a)), Meta::I32s(b)) => a == b,
        (Value::Array(Array::F32(a)), Meta::F32s(b)) => a == b,
        (Value::Array(Array::Array(a)), Meta::Nested(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| *a == Array::U8(b.clone()))
        }
        _ => false,
    }
}

proptest! {
    #[test]
    fn reads_what_was_written((metadata, tensors) in file()) {
        let bytes = support::gguf(&metadata, &tensors);
        let read = gguf::parse(&bytes).unwrap();
        prop_assert_eq!(read.metadata().len(), metadata.len());
        for (key, value) in &metadata {
            prop_assert!(same(&read.metadata()[key], value), "{} {:?}", key, read.metadata()[key]);
        }
        prop_assert_eq!(read.tensors().len(), tensors.len());
        for tensor in &tensors {
            let info = &read.tensors()[&tensor.name];
            prop_assert_eq!(&info.shape[..usize::from(info.rank)], &tensor.shape[..]);
            prop_assert_eq!(info.kind.id(), tensor.kind);
            prop_assert_eq!(&bytes[info.range.clone()], &tensor.data[..]);
        }
    }

    /// A shorter file is refused unless only padding was cut off, and no cut makes the reader
    /// panic.
    #[test]
    fn refuses_truncated_files((metadata, tensors) in file(), cut in any::<prop::sample::Index>()) {
        let bytes = support::gguf(&metadata, &tensors);
        let whole = gguf::parse(&bytes).unwrap();
        let length = cut.index(bytes.len());
        match gguf::parse(&bytes[..length]) {
            Err(e) => prop_assert!(e.to_string().starts_with("gguf: ")),
            Ok(read) => {
                prop_assert_eq!(&read, &whole);
                prop_assert!(whole.tensors().values().all(|info| info.range.end <= length));
            }
        }
    }

    #[test]
    fn survives_flipped_bytes(
        (metadata, tensors) in file(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = support::gguf(&metadata, &tensors);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(read) = gguf::parse(&bytes) {
            prop_assert!(read.tensors().values().all(|info| info.range.end <= bytes.len()));
        }
    }
}

fn message(bytes: &[u8]) -> String {
    gguf::parse(bytes).unwrap_err().to_string()
}

#[test]
fn errors_name_field_offset_and_remedy() {
    let tensor = support::zeros("blk.0.attn_q.weight", &[64]);
    let bytes = support::gguf(&[], std::slice::from_ref(&tensor));
    let expected = "gguf: tensor `blk.0.attn_q.weight`: 256 bytes at offset 96 lie outside the file of 351 bytes \
                    (truncated download?)";
    assert_eq!(bytes.len(), 96 + 256);
    assert_eq!(message(&bytes[..351]), expected);
    assert_eq!(
        message(b"GGUF\x03\0"),
        "gguf: version: needs 4 bytes at offset 4, 2 are left (truncated download?)"
    );
    assert_eq!(
        message(b"<html>"),
        "gguf: the file starts with [60, 104, 116, 109], not with \"GGUF\""
    );
    assert!(message(b"GGUF\0\0\0\x03").contains("big-endian"));
    assert!(message(b"GGUF\x01\0\0\0").contains("version 1 is not supported"));

    let twice = vec![("a".to_owned(), Meta::U32(1)), ("a".to_owned(), Meta::U32(2))];
    assert_eq!(
        message(&support::gguf(&twice, &[])),
        "gguf: metadata key `a` at offset 41 appears twice"
    );
    let alignment = vec![("general.alignment".to_owned(), Meta::U32(48))];
    assert!(message(&support::gguf(&alignment, &[])).contains("`general.alignment` is U32(48)"));
    let unknown = Tensor { kind: 99, ..tensor.clone() };
    assert!(message(&support::gguf(&[], &[unknown])).contains("unknown element type 99 at offset"));
    let ragged = Tensor { kind: 3, shape: vec![33], ..tensor };
    assert!(message(&support::gguf(&[], &[ragged])).contains("rows are no multiple of 32"));
}

/// Lengths of nearly 2^64 in every place that takes one.
#[test]
fn absurd_lengths_are_refused() {
    let mut header = b"GGUF\x03\0\0\0".to_vec();
    header.extend([0; 8]);
    header.extend(u64::MAX.to_le_bytes());
    assert!(
        message(&header).contains("metadata count 18446744073709551615 at offset 16"),
        "{}",
        message(&header)
    );

    for (kind, inner) in [(8u32, None), (9, Some(8u32)), (9, Some(0)), (9, Some(12)), (9, Some(9))]
    {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([0; 8]);
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b'k');
        bytes.extend(kind.to_le_bytes());
        bytes.extend(inner.into_iter().flat_map(u32::to_le_bytes));
        bytes.extend((u64::MAX - 3).to_le_bytes());
        bytes.extend([0; 64]);
        assert!(message(&bytes).starts_with("gguf: value of `k`"), "{}", message(&bytes));
    }

    let huge = Tensor { shape: vec![1 << 40, 1 << 40], ..support::zeros("t", &[1]) };
    assert!(message(&support::gguf(&[], &[huge])).contains("tensor `t`: shape"));
}

#[test]
fn reads_the_real_model() {
    let Some(path) = support::real_model() else { return };
    let bytes = std::fs::read(path).unwrap();
    let file = gguf::parse(&bytes).unwrap();
    let count = |kind| file.tensors().values().filter(|info| info.kind == kind).count();
    assert_eq!((file.version(), file.metadata().len()), (3, 33));
    assert_eq!((count(GgmlType::Q4_1), count(GgmlType::Q8_0), count(GgmlType::F32)), (210, 1, 61));
    let total: usize = file.tensors().values().map(|info| info.range.len()).sum();
    assert_eq!(file.tensors().values().map(|info| info.range.end).max(), Some(bytes.len()));
    assert!((96_500_000..96_700_000).contains(&total), "{total}");
}
