//! A cache as a test wants it: on the host for oracles, in an executor's memory for kernels.
//!
//! Everything a kernel must not use is there to be tripped over: NaN in slots past a length, in ring slabs and in
//! pool slabs that nobody owns; table entries that point far outside; rows longer than what they hold.

use crate::cases::Noise;
use crate::exec::{Mem, Run};
use half::f16;
use kvwarp::ffi::kvw_cache;
use kvwarp::pages::{Entry, HeadView, Pools, packed_slabs, ring_slabs};
use kvwarp::slab::{Format, Layout, Meta, TOKENS, encode};

/// What to build.
#[derive(Clone)]
pub struct Spec {
    pub head_dim: usize,
    pub group: usize,
    pub meta: Meta,
    pub heads: usize,
    /// Tokens of each sequence; with `per_head`, head `h` holds `h * 37` fewer.
    pub lens: Vec<usize>,
    pub per_head: bool,
    pub window: usize,
    /// Slabs in the table: of the window where `None`, else so many (at most all).
    pub packed: Option<usize>,
    /// Formats of the table's slabs in turn; `None` is a hole.
    pub formats: Vec<Option<Format>>,
    /// One table row a sequence, shared by its heads.
    pub shared_rows: bool,
    pub csr: bool,
    /// By how much channels 5 and D - 3 of K exceed the others; values saturate at 65504.
    pub outlier: f32,
    /// The same of V.
    pub v_outlier: f32,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            head_dim: 64,
            group: 32,
            meta: Meta::F16,
            heads: 2,
            lens: vec![300],
            per_head: false,
            window: 64,
            packed: None,
            formats: vec![Some(Format::Q2)],
            shared_rows: false,
            csr: false,
            outlier: 8.0,
            v_outlier: 4.0,
        }
    }
}

struct Row {
    len: usize,
    packed: usize,
    entries: Vec<Entry>,
    ring: Vec<u8>,
}

pub struct Cache {
    pub spec: Spec,
    pools: Pools,
    rows: Vec<Row>,         // [S][H]
    pages: Vec<Vec<Entry>>, // [S], where rows are shared
    ring_slabs: usize,
    pool_slabs: usize,
}

impl Cache {
    pub fn new(spec: &Spec, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let most = spec.lens.iter().max().unwrap().div_ceil(TOKENS);
        let packed_of = |len: usize| match spec.packed {
            None => packed_slabs(len, spec.window),
            Some(n) => n.min(len.div_ceil(TOKENS)),
        };
        let ring_slabs =
            if spec.packed.is_some() { most.max(1) } else { ring_slabs(spec.window) + 1 };
        let mut cache = Self {
            spec: spec.clone(),
            pools: Pools::with_meta(spec.head_dim, spec.group, spec.meta).unwrap(),
            rows: Vec::new(),
            pages: Vec::new(),
            ring_slabs,
            pool_slabs: 0,
        };
        let mut pages =
            cache.shuffled_pages(&mut noise, most * spec.lens.len() * (spec.heads + 1) + 2);
        for &len in &spec.lens {
            let mut shared = Vec::new();
            for i in 0..packed_of(len) {
                let format = spec.formats[i % spec.formats.len()];
                shared.push(format.map_or(Entry::HOLE, |f| Entry::new(f, pages.pop().unwrap())));
            }
            for h in 0..spec.heads {
                let len = if spec.per_head { len.saturating_sub(37 * h) } else { len };
                let mut row = Row {
                    len,
                    packed: packed_of(len),
                    entries: Vec::new(),
                    ring: cache.empty_ring(),
                };
                for page in &shared[..row.packed] {
                    row.entries.push(match (spec.shared_rows, page.get()) {
                        (_, None) => Entry::HOLE,
                        (true, Some((f, page))) => Entry::new(f, (page * spec.heads + h) as u32),
                        (false, Some((f, _))) => Entry::new(f, pages.pop().unwrap()),
                    });
                }
                for i in 0..len.div_ceil(TOKENS) {
                    cache.fill_slab(&mut row, i, &mut noise);
                }
                cache.rows.push(row);
            }
            cache.pages.push(shared);
        }
        cache
    }

    /// Indices of pages in every pool, in random order; what they hold is all ones.
    fn shuffled_pages(&mut self, noise: &mut Noise, count: usize) -> Vec<u32> {
        self.pool_slabs = if self.spec.shared_rows { count * self.spec.heads } else { count };
        for format in Format::ALL {
            for _ in 0..self.pool_slabs {
                let index = self.pools.pool_mut(format).take().unwrap() as usize;
                self.pools.pool_mut(format).slab_mut(index).fill(0xFF);
            }
        }
        let mut order: Vec<u32> = (0..count as u32).collect();
        for i in (1..count).rev() {
            order.swap(i, noise.below(i + 1));
        }
        order
    }

    fn layout(&self, format: Format) -> Layout {
        *self.pools.layout(format)
    }

    fn empty_ring(&self) -> Vec<u8> {
        vec![0xFF; self.ring_slabs * self.layout(Format::F16).slab_bytes()]
    }

    /// Random K and V for the tokens that slab `i` of the row holds, NaN for the others.
    fn fill_slab(&mut self, row: &mut Row, i: usize, noise: &mut Noise) {
        let d = self.spec.head_dim;
        let held = (row.len - i * TOKENS).min(TOKENS);
        let mut values = |outlier: f32| -> Vec<f16> {
            let at = |c: usize| if c == 5 || c == d - 3 { outlier } else { 1.0 };
            let finite = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
            let mut value = |n: usize| (noise.unit() + noise.unit() + noise.unit()) * at(n % d);
            (0..TOKENS * d)
                .map(|n| if n / d < held { finite(value(n)) } else { f16::NAN })
                .collect()
        };
        let (k, v) = (values(self.spec.outlier), values(self.spec.v_outlier));
        if i < row.packed {
            if let Some((format, index)) = row.entries[i].get() {
                let layout = self.layout(format);
                encode(&layout, &k, &v, self.pools.pool_mut(format).slab_mut(index));
            }
        } else {
            let layout = self.layout(Format::F16);
            let at = i % self.ring_slabs * layout.slab_bytes();
            encode(&layout, &k, &v, &mut row.ring[at..at + layout.slab_bytes()]);
        }
    }

    /// The heads of sequence `s`, for an oracle.
    pub fn heads<'a>(&'a self, s: usize) -> Vec<HeadView<'a>> {
        let rows = &self.rows[s * self.spec.heads..][..self.spec.heads];
        let view = |r: &'a Row| HeadView {
            pools: &self.pools,
            table: &r.entries,
            ring: &r.ring,
            len: r.len,
            packed: r.packed,
        };
        rows.iter().map(view).collect()
    }

    pub fn max_slabs(&self) -> usize {
        self.rows.iter().map(|r| r.len.div_ceil(TOKENS)).max().unwrap().max(1)
    }

    /// Page table entries as the kernels read them, and where each sequence starts if they are CSR.
    fn table(&self) -> (Vec<u32>, Vec<i32>, usize) {
        let wild = Entry::new(Format::Q2, 0x0FFF_FFF0).0;
        let rows: Vec<&Vec<Entry>> = match self.spec.shared_rows {
            true => self.pages.iter().collect(),
            false => self.rows.iter().map(|r| &r.entries).collect(),
        };
        let stride = rows.iter().map(|r| r.len()).max().unwrap() + 3;
        let (mut entries, mut starts) = (vec![wild; 5], vec![5]);
        if !self.spec.csr {
            entries.clear();
        }
        for row in rows {
            entries.extend(row.iter().map(|e| e.0));
            if !self.spec.csr {
                entries.resize(starts.len() * stride, wild);
            }
            starts.push(entries.len() as i32);
        }
        entries.push(wild);
        (entries, starts, stride)
    }

    /// Everything in the executor's memory.
    pub fn upload(&self, run: &Run) -> Device {
        let pool = |f: Format| {
            let slab = |i| self.pools.pool(f).slab(i).iter().copied();
            let bytes = || (0..self.pool_slabs).flat_map(slab).collect::<Vec<u8>>();
            self.spec.formats.contains(&Some(f)).then(|| run.upload("pool", &bytes()))
        };
        let (table, indptr, stride) = self.table();
        let ring: Vec<u8> = self.rows.iter().flat_map(|r| r.ring.iter().copied()).collect();
        let lens_heads = if self.spec.per_head { self.spec.heads } else { 1 };
        let a_head = |f: fn(&Row) -> usize| -> Vec<i32> {
            self.rows.iter().step_by(self.spec.heads / lens_heads).map(|r| f(r) as i32).collect()
        };
        Device {
            pools: Format::ALL.map(pool),
            ring: run.upload("ring", &ring),
            table: run.upload("table", &table),
            indptr: self.spec.csr.then(|| run.upload("indptr", &indptr)),
            lens: run.upload("lens", &a_head(|r| r.len)),
            packed: self.spec.packed.map(|_| run.upload("packed", &a_head(|r| r.packed))),
            params: kvw_cache {
                seqs: self.spec.lens.len() as i32,
                kv_heads: self.spec.heads as i32,
                head_dim: self.spec.head_dim as i32,
                group: self.spec.group as i32,
                meta: self.spec.meta as i32,
                window: self.spec.window as i32,
                ring_slabs: self.ring_slabs as i32,
                table_stride: stride as i32,
                table_heads: if self.spec.shared_rows { 1 } else { self.spec.heads as i32 },
                lens_heads: lens_heads as i32,
                ..Default::default()
            },
        }
    }
}

/// A cache in an executor's memory.
pub struct Device {
    pools: [Option<Mem<u8>>; Format::ALL.len()], // as Format::ALL
    ring: Mem<u8>,
    table: Mem<u32>,
    indptr: Option<Mem<i32>>,
    lens: Mem<i32>,
    packed: Option<Mem<i32>>,
    params: kvw_cache,
}

impl Device {
    pub fn params(&self) -> kvw_cache {
        let mut p = self.params;
        for (format, pool) in Format::ALL.iter().zip(&self.pools) {
            p.pools[*format as usize] =
                pool.as_ref().map_or(std::ptr::null_mut(), |m| m.ptr().cast());
        }
        p.ring = self.ring.ptr().cast();
        p.table = self.table.ptr();
        p.indptr = self.indptr.as_ref().map_or(std::ptr::null(), |m| m.ptr());
        p.lens = self.lens.ptr();
        p.packed = self.packed.as_ref().map_or(std::ptr::null(), |m| m.ptr());
        p
    }
}
