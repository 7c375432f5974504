//! EliteKV's cache: one decode step over latents, rows appended, and the products that absorb and expand them.

use super::cache::Noise;
use super::card::{Card, Launch};
use super::case::{Case, Ready, copies};
use anyhow::Result;
use kvwarp::ffi::{self, kvw_latent};
use kvwarp::pages::Entry;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::{head_linear, lowrank_kv};

/// Query heads, kv heads, r, c; D is 128.
#[derive(Clone, Copy)]
struct Heads {
    q: usize,
    kv: usize,
    pairs: usize,
    rank: usize,
}

/// Llama-2-7B at 25 %, 34.4 % and 12.5 %, Llama-3-8B at 25 %.
const MODELS: [Heads; 4] = [
    Heads { q: 32, kv: 32, pairs: 4, rank: 1792 },
    Heads { q: 32, kv: 32, pairs: 12, rank: 2048 },
    Heads { q: 32, kv: 32, pairs: 4, rank: 768 },
    Heads { q: 32, kv: 8, pairs: 4, rank: 448 },
];
const D: usize = 128;

/// Context and batch.
const SIZES: [(usize, usize); 4] = [(32768, 16), (4096, 1), (4096, 16), (32768, 1)];

impl Heads {
    fn name(self) -> String {
        format!("{}x{}c{}r{}", self.q, self.kv, self.rank, self.pairs)
    }

    fn width(self) -> usize {
        self.rank + 2 * self.pairs * self.kv
    }

    /// Bytes of a slab.
    fn slab(self, format: Format) -> usize {
        let [rank, pairs, kv] = [self.rank, self.pairs, self.kv].map(|n| n as i32);
        // SAFETY: numbers alone.
        unsafe { ffi::kvw_latent_slab_bytes(format as i32, rank, pairs, kv) }
    }

    /// As many copies of a cache as keep L2 cold, slabs of random numbers at random places, all of them of this format.
    fn caches(
        self,
        card: &Card,
        format: Format,
        (context, batch): (usize, usize),
    ) -> Result<Vec<kvw_latent>> {
        let (stride, bytes) = (context.div_ceil(TOKENS), self.slab(format));
        let noise = Noise(3).halves(1 << 19, 0.5);
        let places = Noise(4).shuffled(batch * stride);
        let table: Vec<Entry> = places.iter().map(|&place| Entry::new(format, place)).collect();
        let one = |_| {
            let pool = card.take(batch * stride * bytes)?;
            card.fill(pool, bytemuck::cast_slice(&noise), batch * stride * bytes)?;
            let packed = if format == Format::F16 { 0 } else { pool };
            Ok(kvw_latent {
                pool: pool as _,
                packed: packed as _,
                format: format as i32,
                table: card.upload(&table)? as _,
                lens: card.upload(&vec![context as i32; batch])? as _,
                seqs: batch as i32,
                kv_heads: self.kv as i32,
                pairs: self.pairs as i32,
                rank: self.rank as i32,
                table_stride: stride as i32,
            })
        };
        (0..copies(card, batch * stride * bytes)).map(one).collect()
    }

    /// One step of a token a sequence.
    fn attend(self, format: Format, (context, batch): (usize, usize), ctas: i32) -> Case {
        let prepare = move |card: &Card| -> Result<Ready> {
            let caches = self.caches(card, format, (context, batch))?;
            let n = batch * self.q * self.rank;
            let out = card.zeros(n * 2)?;
            let mut args = lowrank_kv::Args {
                struct_size: size_of::<lowrank_kv::Args>() as u32,
                op: ffi::KVW_LOWRANK_ATTEND,
                cache: caches[0],
                q: card.upload(&Noise(1).halves(n, 0.1))? as _,
                q_elite: card.upload(&Noise(2).halves(batch * self.q * D, 0.3))? as _,
                out: out as _,
                workspace: 4096 as _, // until its size is known
                workspace_bytes: usize::MAX,
                q_elite_stride: (self.q * D) as i64,
                head_stride: D as i32,
                q_heads: self.q as i32,
                max_slabs: context.div_ceil(TOKENS) as i32,
                ctas,
                scale: (D as f32).powf(-0.5),
                q_len: 1,
                ..Default::default()
            };
            // SAFETY: live params; nothing behind their pointers is read.
            let (need, bytes) =
                unsafe { (ffi::kvw_lowrank_kv_workspace(&args), ffi::kvw_lowrank_kv_bytes(&args)) };
            // The op counts slabs as f16: which are packed only the table says.
            let saved = self.slab(Format::F16) - self.slab(format);
            let bytes = bytes - batch * context.div_ceil(TOKENS) * saved;
            (args.workspace, args.workspace_bytes) = (card.zeros(need)? as _, need);
            let launch = |cache| -> Launch {
                let args = lowrank_kv::Args { cache, ..args };
                // SAFETY: the arena keeps everything until the next case.
                Box::new(move |stream| unsafe { lowrank_kv::run(&args, stream) })
            };
            let launches = caches.into_iter().map(launch).collect();
            Ok(Ready { launches, bytes, operations: 0.0, output: Some((out, n)) })
        };
        let name = format!("{format:?}").to_lowercase();
        Case::new("lowrank_kv", &name, &self.name(), Box::new(prepare)).at(context, batch, 1)
    }

    /// The slabs of so many sequences that leave their windows, packed.
    fn pack(self, format: Format, slabs: usize) -> Case {
        let prepare = move |card: &Card| -> Result<Ready> {
            let caches = self.caches(card, Format::F16, (4096, slabs.div_ceil(64)))?;
            let to = card.take(slabs * self.slab(format))?;
            let moves: Vec<_> = (0..slabs as u32)
                .map(|i| [Entry::new(Format::F16, i), Entry::new(format, i)])
                .collect();
            let args = lowrank_kv::Args {
                struct_size: size_of::<lowrank_kv::Args>() as u32,
                op: ffi::KVW_LOWRANK_PACK,
                moves: card.upload(&moves)? as _,
                tokens: slabs as i32,
                range: 1.0,
                ..Default::default()
            };
            let packing = |cache| kvw_latent { packed: to as _, format: format as i32, ..cache };
            let args = |cache| lowrank_kv::Args { cache: packing(cache), ..args };
            // SAFETY: live params; nothing behind their pointers is read.
            let bytes = unsafe { ffi::kvw_lowrank_kv_bytes(&args(caches[0])) };
            let launch = |cache| -> Launch {
                let args = args(cache);
                // SAFETY: the arena keeps everything until the next case.
                Box::new(move |stream| unsafe { lowrank_kv::run(&args, stream) })
            };
            let launches = caches.into_iter().map(launch).collect();
            Ok(Ready { launches, bytes, operations: 0.0, output: None })
        };
        let name = format!("{format:?}").to_lowercase();
        let case = Case::new("lowrank_kv", &name, &self.name(), Box::new(prepare));
        case.at(64 * slabs, 1, 64).variant("pack".into())
    }

    /// Rows of one token a sequence, or of a prompt.
    fn append(self, batch: usize, tokens: usize) -> Case {
        let prepare = move |card: &Card| -> Result<Ready> {
            let caches = self.caches(card, Format::F16, (tokens.max(4096), batch))?;
            let rows = (0..=batch).map(|s| (s * tokens) as i32).collect::<Vec<_>>();
            let (z, k) = (self.rank, self.width() - self.rank);
            let args = lowrank_kv::Args {
                struct_size: size_of::<lowrank_kv::Args>() as u32,
                op: ffi::KVW_LOWRANK_APPEND,
                cache: caches[0],
                z: card.upload(&Noise(5).halves(batch * tokens * z, 0.5))? as _,
                k: card.upload(&Noise(6).halves(batch * tokens * k, 0.5))? as _,
                cu_tokens: card.upload(&rows)? as _,
                z_stride: z as i64,
                k_stride: k as i64,
                tokens: (batch * tokens) as i32,
                max_tokens: tokens as i32,
                ..Default::default()
            };
            // SAFETY: live params; nothing behind their pointers is read.
            let bytes = unsafe { ffi::kvw_lowrank_kv_bytes(&args) };
            let launch = |cache| -> Launch {
                let args = lowrank_kv::Args { cache, ..args };
                // SAFETY: the arena keeps everything until the next case.
                Box::new(move |stream| unsafe { lowrank_kv::run(&args, stream) })
            };
            let launches = caches.into_iter().map(launch).collect();
            Ok(Ready { launches, bytes, operations: 0.0, output: None })
        };
        let case = Case::new("lowrank_kv", "f16", &self.name(), Box::new(prepare));
        case.at(tokens.max(4096), batch, tokens).variant("append".into())
    }

    /// Latent queries, or heads out of latent sums.
    fn product(self, batch: usize, absorbs: bool) -> Case {
        let aligned = D - 2 * self.pairs / 8 * 8;
        let (rows, cols) = if absorbs { (self.rank, aligned) } else { (D, self.rank) };
        let prepare = move |card: &Card| -> Result<Ready> {
            let size = 2 * self.kv * rows * cols;
            let n = batch * self.q * rows;
            let (x, y) = (Noise(7).halves(batch * self.q * cols, 0.1), card.zeros(2 * n)?);
            let noise = Noise(8).halves(1 << 19, 0.1);
            let mut args = head_linear::Args {
                struct_size: size_of::<head_linear::Args>() as u32,
                tokens: batch as i32,
                x: card.upload(&x)? as _,
                y: y as _,
                x_stride: (self.q * cols) as i64,
                x_head_stride: cols as i32,
                kv_heads: self.kv as i32,
                q_heads: self.q as i32,
                rows: rows as i32,
                cols: cols as i32,
                ..Default::default()
            };
            let mut launches: Vec<Launch> = Vec::new();
            for _ in 0..copies(card, size) {
                let weight = card.take(size)?;
                card.fill(weight, bytemuck::cast_slice(&noise), size)?;
                args.weight = weight as _;
                // SAFETY: the arena keeps everything until the next case.
                launches.push(Box::new(move |stream| unsafe { head_linear::run(&args, stream) }));
            }
            // SAFETY: live params; nothing behind their pointers is read.
            let bytes = unsafe { ffi::kvw_head_linear_bytes(&args) };
            Ok(Ready { launches, bytes, operations: 0.0, output: Some((y, n)) })
        };
        let shape = format!("{batch}x{}x{rows}x{cols}", self.kv);
        Case::new("head_linear", "f16", &shape, Box::new(prepare))
    }
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for heads in MODELS {
        all.extend(SIZES.map(|at| heads.attend(Format::F16, at, 0)));
    }
    let [llama2, .., llama3] = MODELS;
    for ctas in [66, 264] {
        all.push(llama2.attend(Format::F16, (32768, 1), ctas).variant(format!("ctas={ctas}")));
    }
    for format in [Format::Q4, Format::Q2] {
        for heads in [llama2, llama3] {
            all.extend([SIZES[0], SIZES[3]].map(|at| heads.attend(format, at, 0)));
        }
        all.extend([16, 512].map(|slabs| llama2.pack(format, slabs)));
    }
    all.extend([llama2.append(16, 1), llama2.append(1, 2048)]);
    for batch in [1, 16] {
        all.extend([true, false].map(|absorbs| llama2.product(batch, absorbs)));
    }
    all
}
