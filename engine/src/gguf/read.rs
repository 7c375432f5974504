//! Bounds-checked little-endian reads.

use crate::error::{Error, Result};

/// A position in the file; every read names what it reads, for the error.
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub fn offset(&self) -> u64 {
        self.at as u64
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn short(&self, need: impl std::fmt::Display, what: &str) -> Error {
        let (at, left) = (self.at, self.left());
        Error::Gguf(format!(
            "{what}: needs {need} bytes at offset {at}, {left} are left (truncated download?)"
        ))
    }

    /// The next `need` bytes.
    pub fn take(&mut self, need: u64, what: &str) -> Result<&'a [u8]> {
        if need > self.left() as u64 {
            return Err(self.short(need, what));
        }
        let (at, end) = (self.at, self.at + need as usize);
        self.at = end;
        Ok(&self.bytes[at..end])
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| self.short(N, what))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of items of at least `min` bytes each: refused when that many cannot be left.
    pub fn count(&mut self, min: u64, what: &str) -> Result<u64> {
        let count = self.u64(what)?;
        let most = self.left() as u64 / min;
        if count > most {
            let at = self.at - 8;
            return Err(Error::Gguf(format!(
                "{what} {count} at offset {at}: the file has room for {most} at most"
            )));
        }
        Ok(count)
    }

    /// A length-prefixed UTF-8 string.
    pub fn string(&mut self, what: &str) -> Result<&'a str> {
        let length = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes)
            .map_err(|e| Error::Gguf(format!("{what}: string at offset {at} is no UTF-8: {e}")))
    }

    /// A length-prefixed UTF-8 string of at most `most` bytes.
    pub fn name(&mut self, most: u64, what: &str) -> Result<String> {
        let at = self.at;
        let text = self.string(what)?;
        if text.len() as u64 > most {
            let length = text.len();
            return Err(Error::Gguf(format!(
                "{what} at offset {at} has {length} bytes, at most {most} are allowed"
            )));
        }
        Ok(text.to_owned())
    }

    /// `count` fixed-size scalars of `N` bytes.
    pub fn scalars<T, const N: usize>(
        &mut self,
        count: u64,
        what: &str,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let need = count
            .checked_mul(N as u64)
            .ok_or_else(|| self.short(format_args!("{count} x {N}"), what))?;
        Ok(self.take(need, what)?.as_chunks::<N>().0.iter().map(|&bytes| decode(bytes)).collect())
    }
}
