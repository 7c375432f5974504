//! A model on the device and on the CPU path, given the same tokens.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use kvwarp::linear::Activations;
use kvwarp::slab::{Format, TOKENS, decode};
use kvwarp_engine::cache::Cache;
use kvwarp_engine::calibration::Calibration;
use kvwarp_engine::config::Config;
use kvwarp_engine::gpu::platform::Platform;
use kvwarp_engine::gpu::{self, Gpu, Options};
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::runner::{Choice, Row, Runner, Turn};
use kvwarp_engine::source::Source;
use kvwarp_engine::watch::Watch;

/// The greedy choice.
pub const GREEDY: Choice = Choice::GREEDY;

/// A model of `fixtures`, from a bundle of its own folder.
pub fn fixture(name: &str) -> Source {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let folder = std::env::var_os("KVW_BUNDLE").map_or_else(here, Into::into);
    Source::open(&folder.join("fixtures").join(name)).unwrap()
}

/// The same model where bytes are tokens, in a folder of its own.
pub fn speaking(name: &str) -> (tempfile::TempDir, Source) {
    let (folder, model) = (tempfile::tempdir().unwrap(), fixture(name));
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model.path().join(file), folder.path().join(file)).unwrap();
    }
    let visible = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let hidden: Vec<u32> = (0..256).filter(|b| !visible(b)).collect();
    let letter = |b: u32| hidden.binary_search(&b).map_or(b, |i| 256 + i as u32);
    let vocab: std::collections::BTreeMap<_, _> =
        (0..256).map(|b| (char::from_u32(letter(b)).unwrap().to_string(), b)).collect();
    let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let source = Source::open(folder.path()).unwrap();
    (folder, source)
}

/// With `watch`, which nobody stops.
pub fn watched<R>(body: impl FnOnce(&mut Watch<'_>) -> R) -> R {
    let (stop, mut step) = (AtomicBool::new(false), |_| {});
    body(&mut Watch::new(&stop, &mut step))
}

/// Tokens of a text, the same for the same seed.
pub fn text(seed: u32, n: usize) -> Vec<u32> {
    let next = |x: &u32| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(seed), next).skip(1).take(n).map(|x| x >> 24).collect()
}

/// The model on the device.
pub fn on_device(
    source: &Source,
    spec: &str,
    calibration: Option<&Calibration>,
    options: &Options,
    machine: &Rc<impl Platform + 'static>,
) -> Gpu {
    let platform: Rc<dyn Platform> = machine.clone();
    let mut shares = Vec::new();
    let mut progress = |done: usize, total: usize| shares.push((done, total));
    let spec = spec.parse().unwrap();
    let gpu = gpu::open(source, &spec, calibration, options, platform, &mut progress).unwrap();
    let (done, total) = shares.last().copied().unwrap();
    assert!(done <= total && done > total / 2, "{done} of {total} bytes");
    gpu
}

/// The same sequences on both.
pub struct Pair<'m> {
    pub gpu: Gpu,
    model: &'m Model<'m>,
    cache: Cache,
    /// The same sequences with exact keys and values.
    exact: Cache,
    work: Work,
    /// Rows of the device and of the CPU path, and the newest token.
    pub rows: Vec<(Row, Row, u32)>,
    pub seen: Seen,
}

/// How far the device was from the CPU path.
#[derive(Debug, Default)]
pub struct Seen {
    /// Largest difference of logits.
    pub worst: f32,
    /// Largest relative L2 distance of a token's logits.
    pub apart: f32,
    /// Tokens chosen otherwise where the best two logits are further apart than twice the largest difference.
    pub other: usize,
    /// Tokens chosen otherwise at all, and tokens.
    pub unlike: usize,
    pub steps: usize,
    /// The same between the CPU path with exact keys and values and the CPU path.
    pub moved: f32,
    /// Relative L2 distance of K and V of the first layer's slabs, f16 and quantised: those depend on tokens alone.
    pub slabs: [f32; 2],
}

impl<'m> Pair<'m> {
    pub fn new(gpu: Gpu, model: &'m Model<'m>) -> Self {
        let cache = model.cache(gpu.spec(), gpu.context()).unwrap();
        let exact = model.cache(&"f16".parse().unwrap(), gpu.context()).unwrap();
        let (work, rows) = (Work::default(), Vec::new());
        Self { gpu, model, cache, exact, work, rows, seen: Seen::default() }
    }

    /// A sequence that begins with `prompt`, read in blocks of `block` but for its last token.
    pub fn join(&mut self, prompt: &[u32], block: usize) {
        let (device, host) = (self.gpu.open().unwrap(), self.cache.open());
        assert_eq!(self.exact.open(), host);
        self.rows.push((device, host, 0));
        self.read(self.rows.len() - 1, prompt, block);
    }

    /// Sequence `i` is told more after its newest token.
    pub fn tell(&mut self, i: usize, tokens: &[u32]) {
        let tokens = [&[self.rows[i].2], tokens].concat();
        self.read(i, &tokens, tokens.len());
    }

    fn read(&mut self, i: usize, tokens: &[u32], block: usize) {
        let (device, host, _) = self.rows[i];
        let (last, read) = tokens.split_last().unwrap();
        for block in read.chunks(block) {
            watched(|watch| self.gpu.read(device, block, watch)).unwrap();
            for cache in [&mut self.cache, &mut self.exact] {
                let to = (&mut *cache, host);
                watched(|watch| self.model.read(block, to, &mut self.work, watch)).unwrap();
                cache.unstage();
            }
        }
        self.rows[i].2 = *last;
    }

    pub fn leave(&mut self, i: usize) {
        let (device, host, _) = self.rows.remove(i);
        self.gpu.close(device);
        self.cache.close(host);
        self.exact.close(host);
    }

    /// A step of all sequences; each goes on with what the CPU path chooses.
    pub fn step(&mut self) {
        let tokens: Vec<_> = self.rows.iter().map(|&(.., token)| [token]).collect();
        let turns = self.rows.iter().zip(&tokens).map(|(&(row, ..), tokens)| Turn {
            row,
            tokens,
            choice: &GREEDY,
            draw: 0,
            recent: &[],
        });
        let turns: Vec<_> = turns.collect();
        let mut chosen = Vec::new();
        self.gpu.step(&turns, &mut chosen).unwrap();
        let hosts: Vec<_> = self
            .rows
            .iter()
            .zip(&tokens)
            .map(|(&(_, host, _), tokens)| (host, &tokens[..]))
            .collect();
        self.model.step(&hosts, &mut self.exact, &mut self.work).unwrap();
        let exact = self.work.logits().to_vec();
        self.model.step(&hosts, &mut self.cache, &mut self.work).unwrap();
        let vocab = self.model.config().vocab;
        for (i, expected) in self.work.logits().chunks_exact(vocab).enumerate() {
            let found = self.gpu.logits(self.rows[i].0, 0).unwrap().unwrap();
            assert_eq!(chosen[i], [best(&found)]);
            let token = self.seen.compare(&found, expected);
            let moved = relative(&exact[i * vocab..][..vocab], expected);
            self.seen.moved = self.seen.moved.max(moved);
            self.rows[i].2 = token;
        }
    }

    /// Tokens of each head of sequence `i`, on the device and on the CPU path.
    pub fn lens(&mut self, i: usize) -> [Vec<usize>; 2] {
        let (row, host, _) = self.rows[i];
        let frozen = self.gpu.freeze(row).unwrap();
        let device = frozen.heads.iter().map(|held| held.len).collect();
        self.gpu.melt(frozen);
        let layers = 0..self.gpu.config().layers;
        [device, layers.flat_map(|layer| self.cache.lens(host, layer)).collect()]
    }

    /// Compares the latents that sequence `i` holds, all slabs of all layers; of the first, tokens alone make them.
    pub fn compare_latents(&mut self, i: usize) {
        let (row, host, _) = self.rows[i];
        let frozen = self.gpu.freeze(row).unwrap();
        for (slab, &entry) in frozen.entries.iter().enumerate() {
            let mut bytes = &self.gpu.slab(entry).unwrap()[..];
            for layer in 0..self.gpu.config().layers {
                let view = self.cache.latent(host, layer, 0).unwrap();
                assert_eq!((view.len, view.slabs()), (frozen.len, frozen.entries.len()));
                let expected = view.slab(slab).unwrap();
                let format = entry.get().unwrap().0;
                assert!(layer > 0 || slab >= frozen.heads[0].packed || format == expected.0);
                let (own, others) = bytes.split_at(view.shape.bytes(format));
                bytes = others;
                let rows = 0..TOKENS.min(view.len - slab * TOKENS);
                let read = |slab: (Format, &[u8])| -> Vec<f32> {
                    rows.clone().flat_map(|token| view.shape.read(slab, token)).collect()
                };
                let off = relative(&read((format, own)), &read(expected));
                // Codes differ where what they stand for hardly does.
                let seen = &mut self.seen.slabs[usize::from(layer > 0 || format != Format::F16)];
                *seen = seen.max(off);
            }
            assert!(bytes.is_empty());
        }
        self.gpu.melt(frozen);
    }

    /// Compares what sequence `i` holds, slab by slab.
    pub fn compare_slabs(&mut self, i: usize) {
        let (row, host, _) = self.rows[i];
        let frozen = self.gpu.freeze(row).unwrap();
        let Config { layers, kv_heads, head_dim, .. } = *self.gpu.config();
        let mut entries = &frozen.entries[..];
        for (layer, h) in (0..layers).flat_map(|l| (0..kv_heads).map(move |h| (l, h))) {
            let (view, len) =
                (self.cache.views(host, layer)[h], frozen.heads[layer * kv_heads + h].len);
            assert_eq!(view.len, len, "tokens of head {h} of layer {layer}");
            let (own, others) = entries.split_at(len.div_ceil(TOKENS));
            entries = others;
            for (slab, &entry) in own.iter().enumerate() {
                let expected = view.slab(slab).unwrap();
                assert_eq!(entry.get().unwrap().0, expected.layout.format, "slab {slab}");
                let found = self.gpu.slab(entry).unwrap();
                let here = (len - slab * TOKENS).min(TOKENS) * head_dim;
                let values = |bytes: &[u8]| {
                    let (mut k, mut v) =
                        (vec![0.0; TOKENS * head_dim], vec![0.0; TOKENS * head_dim]);
                    decode(expected.layout, bytes, &mut k, &mut v);
                    [&k[..here], &v[..here]].concat()
                };
                let quantised = usize::from(expected.layout.format != Format::F16);
                if layer > 0 {
                    continue;
                }
                let off = relative(&values(&found), &values(expected.bytes));
                self.seen.slabs[quantised] = self.seen.slabs[quantised].max(off);
            }
        }
        self.gpu.melt(frozen);
    }
}

impl Seen {
    /// Adds a token's logits; returns the CPU path's choice.
    fn compare(&mut self, found: &[f32], expected: &[f32]) -> u32 {
        assert_eq!(found.len(), expected.len());
        let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        let worst = differences.fold(0.0, f32::max);
        let (token, chosen) = (best(expected), best(found));
        let margin = expected[token as usize] - expected[chosen as usize];
        self.worst = self.worst.max(worst);
        self.apart = self.apart.max(relative(found, expected));
        self.unlike += usize::from(token != chosen);
        self.other += usize::from(margin > 2.0 * worst);
        self.steps += 1;
        token
    }
}

/// Relative L2 distance, infinite where something is no number.
pub fn relative(found: &[f32], expected: &[f32]) -> f32 {
    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
    let off = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let distance = (off / squares(&mut expected.iter().copied())).sqrt() as f32;
    if distance.is_nan() { f32::INFINITY } else { distance }
}

pub fn best(logits: &[f32]) -> u32 {
    let larger = |a: usize, b: usize| if logits[b] > logits[a] { b } else { a };
    (0..logits.len()).reduce(larger).unwrap() as u32
}

/// The CPU path of a model, exact in its activations.
pub fn on_host<'m>(source: &'m Source, calibration: Option<&Calibration>) -> Model<'m> {
    let model = Model::new(source, 1, Activations::F32).unwrap();
    match calibration {
        Some(calibration) => model.with_calibration(calibration),
        None => model,
    }
}
