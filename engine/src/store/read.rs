//! Reading a cache file, which may hold anything.

use std::collections::HashMap;
use std::ops::Range;

use kvwarp::pages::{Entry, Pools, packed_slabs};
use kvwarp::slab::{self, Format};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use super::{Document, Fault, Reader, VERSION};
use crate::cache::{Plan, formats, stride};
use crate::runner::Held;
use crate::spec::CacheSpec;

/// What a cache file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// By what the document was read.
    pub reader: Reader,
    /// What was read.
    pub document: Document,
    /// What each head holds, `[layers * kv_heads]`.
    pub heads: Vec<Held>,
    /// As [`crate::runner::Frozen`] has them; an index counts the slabs of its format in the file.
    pub entries: Vec<Entry>,
    /// Of each format, by tag, where its slabs lie in the file, and the bytes of one.
    slabs: [(Range<usize>, usize); Format::ALL.len()],
}

/// Reads the bytes of a whole file, each field for itself: [`Contents::check`] says whether they go together.
///
/// # Errors
/// [`Fault`] with the field at fault.
pub fn parse(bytes: &[u8]) -> Result<Contents, Fault> {
    let whole = |e| Fault::Format(format!("{e} (cut off, or no cache; {} bytes)", bytes.len()));
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(whole)?;
    let fields = Fields(metadata.metadata().as_ref());
    let (reader, chat) = fields.read()?;
    let tensors = Tensors { metadata: &metadata, data: &bytes[8 + header..] };
    let ([layers, kv_heads], d) = (reader.tables(), reader.shape[2]);
    let numbers = tensors.numbers("heads", &[layers, kv_heads, 3])?;
    let heads = numbers.as_chunks().0.iter().map(|held: &[u32; 3]| {
        let [len, packed, chosen] = held.map(|n| n as usize);
        Held { len, packed, chosen }
    });
    let CacheSpec { group, meta, .. } = reader.spec;
    let pools = Pools::with_meta(d, group, meta)
        .map_err(|_| Fault::field("head_dim", d, "one that slabs have"))?;
    let mut slabs = std::array::from_fn(|_| (0..0, 0));
    for format in Format::ALL {
        // Of latents the model knows it.
        let size = (!reader.spec.latent).then(|| pools.layout(format).slab_bytes());
        let (Range { start, end }, size) = tensors.slabs(format, size)?;
        slabs[format as usize] = (8 + header + start..8 + header + end, size);
    }
    let tokens = tensors.numbers("tokens", &[])?;
    let entries = tensors.numbers("entries", &[])?.into_iter().map(Entry).collect();
    let document = Document { tokens, chat };
    Ok(Contents { reader, document, heads: heads.collect(), entries, slabs })
}

impl Contents {
    /// Whether a cache with this plan, of a model with so many tokens, can have come to hold this.
    ///
    /// # Errors
    /// [`Fault`] with the field at fault.
    pub fn check(&self, plan: &Plan, vocab: usize) -> Result<(), Fault> {
        let tokens = &self.document.tokens;
        if tokens.is_empty() {
            return Err(Fault::field("tokens", "empty", "a document"));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Fault::field("tokens", token, format!("tokens below {vocab}")));
        }
        if let Some(latents) = &plan.latents {
            for format in [Format::F16, self.reader.spec.store] {
                let ((slabs, got), size) =
                    (&self.slabs[format as usize], stride(latents.iter(), format));
                if *got != size && !slabs.is_empty() {
                    return Err(Fault::field(slabs_of(format), format!("{got} bytes"), size));
                }
            }
        }
        self.heads.iter().enumerate().try_for_each(|(h, held)| self.check_head(h, held))?;
        self.check_entries(plan)
    }

    fn check_head(&self, h: usize, held: &Held) -> Result<(), Fault> {
        let (&Held { len, packed, chosen }, n) = (held, self.document.tokens.len());
        let (spec, [_, kv_heads]) = (&self.reader.spec, self.reader.tables());
        let wrong = |part: &str, got: usize, expected: String| {
            let name = format!("heads[{}][{}].{part}", h / kv_heads, h % kv_heads);
            Err(Fault::field(name, got, expected))
        };
        if len > n || (len < n && !spec.selects()) {
            let expected = if spec.selects() { "at most " } else { "" };
            return wrong("len", len, format!("{expected}{n}"));
        }
        let left = packed_slabs(len, spec.window);
        if packed != left {
            return wrong("packed", packed, left.to_string());
        }
        let Some(lag) = spec.lag() else {
            return if chosen == 0 { Ok(()) } else { wrong("chosen", chosen, "0".into()) };
        };
        // LagKV has chosen among all but two partitions, which the ring holds.
        let sink = spec.evict.map_or(0, |evict| usize::from(evict.options.sink));
        match chosen <= len && len < chosen.max(sink) + 2 * lag {
            true => Ok(()),
            false => {
                wrong("chosen", chosen, format!("{} to {len}", (len + 1).saturating_sub(2 * lag)))
            }
        }
    }

    /// Each entry is the next slab of the format that it must have, and no slab is left over.
    fn check_entries(&self, plan: &Plan) -> Result<(), Fault> {
        let (mut entries, mut counts) = (self.entries.iter().enumerate(), [0; Format::ALL.len()]);
        for (h, &held) in self.heads.iter().enumerate() {
            let spec = &self.reader.spec;
            for format in formats(spec, plan.store(spec, h), held) {
                let next = Entry::new(format, counts[format as usize]);
                counts[format as usize] += 1;
                match entries.next() {
                    Some((_, &entry)) if entry == next => {}
                    Some((i, &entry)) => {
                        let name = format!("entries[{i}]");
                        return Err(Fault::field(name, described(entry), described(next)));
                    }
                    None => {
                        let (got, expected) = (self.entries.len(), "those of all heads' tokens");
                        return Err(Fault::field("entries", format!("{got} entries"), expected));
                    }
                }
            }
        }
        let named: usize = counts.iter().map(|&n| n as usize).sum();
        if self.entries.len() != named {
            let got = format!("{} entries", self.entries.len());
            return Err(Fault::field("entries", got, named));
        }
        for (format, ((range, size), count)) in
            Format::ALL.iter().zip(self.slabs.iter().zip(counts))
        {
            let slabs = range.len() / size;
            if slabs != count as usize {
                let got = format!("{slabs} slabs");
                return Err(Fault::field(slabs_of(*format), got, count));
            }
        }
        Ok(())
    }

    /// Format and bytes of a slab in the file that was parsed; `None` for a hole.
    pub fn slab<'a>(&self, file: &'a [u8], entry: Entry) -> Option<(Format, &'a [u8])> {
        let (format, index) = entry.get()?;
        let (range, size) = &self.slabs[format as usize];
        let slabs = file.get(range.clone())?;
        Some((format, slabs.chunks_exact(*size).nth(index)?))
    }
}

/// Name of the tensor of a format's slabs.
pub fn slabs_of(format: Format) -> String {
    format!("slabs.{}", format!("{format:?}").to_lowercase())
}

/// As the metadata says how a document goes on.
pub fn prompt(chat: bool) -> &'static str {
    if chat { "chat" } else { "plain" }
}

fn described(entry: Entry) -> String {
    match entry.get() {
        Some((format, index)) => format!("{format:?} slab {index}"),
        None => format!("no slab ({:#x})", entry.0),
    }
}

/// Metadata.
struct Fields<'a>(Option<&'a HashMap<String, String>>);

impl Fields<'_> {
    fn get(&self, name: &str) -> &str {
        self.0.and_then(|fields| fields.get(name)).map_or("missing", String::as_str)
    }

    fn expect(&self, name: &str, expected: &str) -> Result<(), Fault> {
        let got = self.get(name);
        if got == expected { Ok(()) } else { Err(Fault::field(name, short(got), expected)) }
    }

    fn number(&self, name: &str) -> Result<usize, Fault> {
        let number: Option<u32> = self.get(name).parse().ok();
        number
            .map(|n| n as usize)
            .ok_or_else(|| Fault::field(name, short(self.get(name)), "a number"))
    }

    fn read(&self) -> Result<(Reader, bool), Fault> {
        self.expect("kvwarp.cache", VERSION)?;
        self.expect("slab", &slab::VERSION.to_string())?;
        let hash = |name| match self.get(name) {
            hash if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(hash),
            other => Err(Fault::field(name, short(other), "a hash")),
        };
        let model = hash("model")?.to_owned();
        let [layers, kv_heads, d] = ["layers", "kv_heads", "head_dim"].map(|n| self.number(n));
        let spec: CacheSpec = self.get("spec").parse().map_err(|e: crate::spec::SpecError| {
            Fault::field(
                "spec",
                short(self.get("spec")),
                format!("one that this version knows ({})", e.problem),
            )
        })?;
        if spec.kivi_exact {
            return Err(Fault::field("spec", spec, "one without `kivi_exact`"));
        }
        let calibration = match self.get("calibration") {
            "none" => None,
            _ => Some(hash("calibration")?.to_owned()),
        };
        let chat = match self.get("prompt") {
            "chat" => true,
            "plain" => false,
            other => return Err(Fault::field("prompt", short(other), "chat or plain")),
        };
        Ok((Reader { model, shape: [layers?, kv_heads?, d?], spec, calibration }, chat))
    }
}

/// The beginning of what a file says, printable.
fn short(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

struct Tensors<'a> {
    metadata: &'a Metadata,
    data: &'a [u8],
}

impl Tensors<'_> {
    /// Numbers of a tensor of this shape; none given, a list of any length.
    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>, Fault> {
        let Some(info) = self.metadata.info(name) else {
            return Err(Fault::field(name, "missing", "there"));
        };
        let fits = if shape.is_empty() { info.shape.len() == 1 } else { info.shape == shape };
        if info.dtype != Dtype::U32 || !fits {
            let got = format!("{:?} {:?}", info.dtype, info.shape);
            let shape = if shape.is_empty() { "[n]".to_owned() } else { format!("{shape:?}") };
            return Err(Fault::field(name, got, format!("U32 {shape}")));
        }
        let (from, to) = info.data_offsets;
        let numbers = self.data[from..to].as_chunks().0.iter();
        Ok(numbers.map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    /// Where in the data the slabs of a format lie, and the bytes of each; `size`, where that is known.
    fn slabs(&self, format: Format, size: Option<usize>) -> Result<(Range<usize>, usize), Fault> {
        let name = slabs_of(format);
        let Some(info) = self.metadata.info(&name) else { return Ok((0..0, size.unwrap_or(1))) };
        match info.shape[..] {
            [_, bytes] if bytes == size.unwrap_or(bytes.max(1)) && info.dtype == Dtype::U8 => {
                Ok((info.data_offsets.0..info.data_offsets.1, bytes))
            }
            _ => {
                let got = format!("{:?} {:?}", info.dtype, info.shape);
                let size = size.map_or("bytes".into(), |size| size.to_string());
                Err(Fault::field(name, got, format!("U8 [slabs, {size}]")))
            }
        }
    }
}
