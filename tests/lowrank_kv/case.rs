//! A latent cache as a test wants it, and calls on it: NaN in rows past a length and in slabs that nobody owns, holes, and
//! entries that point far outside.

use crate::cases::{Noise, close, relative_l2};
use crate::exec::{Mem, Run, op};
use half::f16;
use kvwarp::ffi::{self, kvw_lowrank_kv_params as Params};
use kvwarp::lowrank_kv::{Shape, View, oracle};
use kvwarp::pages::{Entry, Pool};
use kvwarp::slab::{Format, TOKENS};

/// What to build, and how to call the op on it.
#[derive(Clone, Debug)]
pub struct Case {
    pub kv_heads: usize,
    pub group: usize,
    pub pairs: usize,
    pub rank: usize,
    pub lens: Vec<usize>,
    /// Every so many slabs one is a hole; 0: none.
    pub holes: usize,
    pub ctas: i32,
    pub least: i32,
    /// The way of sm_90, where the executor can choose.
    pub hopper: bool,
    /// Query tokens of a sequence.
    pub rows: usize,
    /// Of full slabs, but for each fifth.
    pub store: Format,
}

/// Three kv heads whose keys share columns, the last of them alone; warps with one block of z and with two.
pub fn case() -> Case {
    Case {
        kv_heads: 3,
        group: 3,
        pairs: 4,
        rank: 144,
        lens: vec![64 * 4 + 21],
        holes: 3,
        ctas: 1,
        least: 1,
        hopper: false,
        rows: 1,
        store: Format::F16,
    }
}

pub const SCALE: f32 = 0.1;
/// What 2-bit codes span.
pub const RANGE: f32 = 0.88;
/// Elements of a query head that are not elite.
const OTHERS: usize = 6;

/// A case with its numbers.
pub struct Cache {
    pub case: Case,
    pub shape: Shape,
    pub pool: Pool,
    pub packed: Pool,
    /// `[S, stride]`
    pub table: Vec<Entry>,
    pub stride: usize,
    /// `[S * rows][H * G, c]`
    pub q: Vec<Vec<f32>>,
    /// `[S * rows][H * G, 2 r]`
    pub q_elite: Vec<Vec<f32>>,
}

/// Numbers that f16 holds, one in a hundred of them large.
fn halves(noise: &mut Noise, n: usize, size: f32) -> Vec<f32> {
    let value = |noise: &mut Noise| {
        let x = noise.unit() * size;
        f16::from_f32(if noise.below(100) == 0 { 8.0 * x } else { x }).to_f32()
    };
    (0..n).map(|_| value(noise)).collect()
}

impl Cache {
    pub fn new(case: &Case) -> Self {
        let mut noise = Noise(case.rank as u64 + 7 * case.pairs as u64);
        let shape = Shape::new(case.kv_heads, case.pairs, case.rank).unwrap();
        let stride = case.lens.iter().max().unwrap().div_ceil(TOKENS) + 1;
        let mut pool = Pool::of(shape.slab_bytes());
        let mut packed = Pool::of(match case.store {
            Format::F16 => 16,
            store => shape.bytes(store),
        });
        let mut free: Vec<u32> =
            (0..case.lens.len() * stride + 1).map(|_| pool.take().unwrap()).collect();
        free.iter().for_each(|&i| pool.slab_mut(i as usize).fill(0xFF));
        // Slabs of a sequence lie apart, in no order; what is not held points far outside.
        let nowhere = Entry::new(Format::F16, 0x0FFF_FFFF);
        let mut table = vec![nowhere; case.lens.len() * stride];
        for (s, &len) in case.lens.iter().enumerate() {
            for i in 0..len.div_ceil(TOKENS) {
                let entry = &mut table[s * stride + i];
                if case.holes > 0 && (i + s) % case.holes == case.holes - 1 {
                    *entry = if i % 2 == 0 { Entry::HOLE } else { Entry::new(Format::Q8, 1 << 27) };
                    continue;
                }
                let index = free.swap_remove(noise.below(free.len()));
                *entry = Entry::new(Format::F16, index);
                let slab = pool.slab_mut(index as usize);
                for token in 0..TOKENS.min(len - i * TOKENS) {
                    let z = halves(&mut noise, case.rank, 1.0);
                    let k = halves(&mut noise, shape.width() - case.rank, 1.0);
                    shape.write(slab, token, &z, &k).unwrap();
                }
                if case.store != Format::F16 && len >= (i + 1) * TOKENS && i % 5 != 4 {
                    let index = packed.take().unwrap();
                    let to = packed.slab_mut(index as usize);
                    shape.pack(case.store, slab, RANGE, to).unwrap();
                    slab.fill(0xFF);
                    *entry = Entry::new(case.store, index);
                }
            }
        }
        let heads = case.kv_heads * case.group;
        let mut queries = |n: usize| -> Vec<Vec<f32>> {
            let tokens = 0..case.lens.len() * case.rows;
            tokens.map(|_| halves(&mut noise, heads * n, 0.6)).collect()
        };
        let (q, q_elite) = (queries(case.rank), queries(2 * case.pairs));
        Self { case: case.clone(), shape, pool, packed, table, stride, q, q_elite }
    }

    /// All that sequence `s` holds.
    pub fn view(&self, s: usize) -> View<'_> {
        let table = &self.table[s * self.stride..][..self.stride];
        let packed = (self.case.store != Format::F16).then_some((self.case.store, &self.packed));
        View { shape: self.shape, pool: &self.pool, packed, table, len: self.case.lens[s] }
    }

    /// Each query token: its latent queries, elite queries, and what it sees.
    pub fn queries(&self) -> impl Iterator<Item = (&[f32], &[f32], View<'_>)> {
        let (all, rows) = (self.q.iter().zip(&self.q_elite).enumerate(), self.case.rows);
        all.map(move |(i, (q, q_elite))| {
            let (view, later) = (self.view(i / rows), rows - 1 - i % rows);
            (&q[..], &q_elite[..], View { len: view.len.saturating_sub(later), ..view })
        })
    }

    /// The bytes of the pool.
    pub fn bytes(&self) -> Vec<u8> {
        bytes(&self.pool)
    }

    /// `[S, rows, H * G, c]` and `[S, rows, H * G]` of the oracle.
    pub fn want(&self) -> (Vec<f64>, Vec<f64>) {
        let of = |(q, q_elite, view): (&[f32], &[f32], View<'_>)| {
            oracle(q, q_elite, &view, f64::from(SCALE))
        };
        let (out, lse): (Vec<_>, Vec<_>) = self.queries().map(of).unzip();
        (out.concat(), lse.concat())
    }
}

/// A cache in an executor's memory.
pub struct Device {
    pub pool: Mem<u8>,
    params: ffi::kvw_latent,
    _rest: (Mem<u8>, Mem<u32>, Mem<i32>),
}

impl Device {
    pub fn new(run: &Run, cache: &Cache, pool: &[u8]) -> Self {
        let table: &[u32] = bytemuck::cast_slice(&cache.table);
        let lens: Vec<i32> = cache.case.lens.iter().map(|&n| n as i32).collect();
        let (pool, table) = (run.upload("pool", pool), run.upload("table", table));
        let lens = run.upload("lens", &lens);
        let (store, slabs) = (cache.case.store, [bytes(&cache.packed), vec![0xFF; 16]].concat());
        let packed = run.upload("packed", &slabs);
        let params = ffi::kvw_latent {
            pool: pool.ptr().cast(),
            packed: match store {
                Format::F16 => std::ptr::null_mut(),
                _ => packed.ptr().cast(),
            },
            table: table.ptr(),
            lens: lens.ptr(),
            seqs: cache.case.lens.len() as i32,
            kv_heads: cache.case.kv_heads as i32,
            pairs: cache.case.pairs as i32,
            rank: cache.case.rank as i32,
            table_stride: cache.stride as i32,
            format: store as i32,
        };
        Self { pool, params, _rest: (packed, table, lens) }
    }

    pub fn params(&self) -> ffi::kvw_latent {
        self.params
    }
}

/// Of all slabs in use.
fn bytes(pool: &Pool) -> Vec<u8> {
    let slabs = 0..pool.slots().used();
    slabs.flat_map(|i| pool.slab(i).to_vec()).collect()
}

fn bits(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()
}

/// What ATTEND makes of a cache, `out` and `lse`.
pub fn attend(run: &Run, cache: &Cache) -> Result<(Vec<f32>, Vec<f32>), String> {
    let (case, heads) = (&cache.case, cache.case.kv_heads * cache.case.group);
    let device = Device::new(run, cache, &cache.bytes());
    let n = case.lens.len() * case.rows * heads;
    // Elite elements lie in rows of whole heads, as rope_select leaves them; the others are none of our business.
    let row = 2 * case.pairs + OTHERS;
    let mut elite = vec![f32::NAN; n * row];
    for (i, q) in cache.q_elite.concat().chunks_exact(2 * case.pairs).enumerate() {
        elite[i * row..][..2 * case.pairs].copy_from_slice(q);
    }
    let (q, elite) =
        (run.upload("q", &bits(&cache.q.concat())), run.upload("q_elite", &bits(&elite)));
    let (out, lse) = (run.alloc::<u16>("out", n * case.rank), run.alloc::<f32>("lse", n));
    let mut params = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_LOWRANK_ATTEND,
        cache: device.params(),
        q: q.ptr().cast(),
        q_elite: elite.ptr().cast(),
        out: out.ptr().cast(),
        lse: lse.ptr(),
        q_elite_stride: (heads * row) as i64,
        head_stride: row as i32,
        q_heads: heads as i32,
        q_len: case.rows as i32,
        max_slabs: cache.stride as i32,
        ctas: case.ctas,
        least: case.least,
        scale: SCALE,
        ..Default::default()
    };
    params.workspace_bytes = op!(kvw_lowrank_kv).workspace(&params);
    let workspace = run.alloc::<u8>("workspace", params.workspace_bytes);
    params.workspace = workspace.ptr().cast();
    run.hopper(case.hopper);
    run.call(&op!(kvw_lowrank_kv), &params)?;
    let out = out.download().iter().map(|&x| f16::from_bits(x).to_f32()).collect();
    Ok((out, lse.download()))
}

/// Relative L2 of the output at most 1e-3, rows that see nothing exactly zero, lse within 1e-3.
pub fn compare(cache: &Cache, (out, lse): &(Vec<f32>, Vec<f32>)) -> Result<(), String> {
    let (want, want_lse) = cache.want();
    close("lse", lse, &want_lse, 1e-3, 1e-4)?;
    for (row, want) in out.chunks(cache.case.rank).zip(want.chunks(cache.case.rank)) {
        if want.iter().all(|&x| x == 0.0) && row.iter().any(|&x| x != 0.0) {
            return Err("a row that sees no tokens is not zero".into());
        }
    }
    let error = relative_l2(out, &want);
    if error <= 1e-3 { Ok(()) } else { Err(format!("relative L2 {error:.2e}")) }
}

pub fn matches(run: &Run, case: &Case) -> Result<(), String> {
    let cache = Cache::new(case);
    compare(&cache, &attend(run, &cache)?)
}
