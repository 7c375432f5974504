//! A layer in the memory of a GPU, by the kernels of kvwarp on candle's stream.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{CudaDevice, Error, Result, bail};
use half::f16;
use kvwarp::ffi;
use kvwarp::pages::{Entry, packed_slabs, ring_slabs};
use kvwarp::slab::{Format, Layout, TOKENS};
use kvwarp::view::cudarc::{read, stream, write};
use kvwarp::{kv_pack, paged_attn, prefill_attn};

use crate::attention::{Shape, Store};

pub struct Layer {
    device: CudaDevice,
    store: Store,
    shape: Shape,
    /// Bytes of a slab of the ring, and of the pool.
    slab: [usize; 2],
    /// Slabs a head that the pool has room for.
    room: usize,
    len: usize,
    /// `[kv_heads, room]` slabs; the table says so.
    pool: CudaSlice<u8>,
    table: CudaSlice<u32>,
    /// `[kv_heads, slabs]`
    ring: CudaSlice<u8>,
    /// Tokens held, and slabs in the table while a prompt is read.
    lens: CudaSlice<i32>,
    packed: CudaSlice<i32>,
    workspace: CudaSlice<u8>,
}

fn refused(e: kvwarp::Error) -> Error {
    Error::wrap(e)
}

impl Layer {
    pub fn new(store: Store, shape: Shape, device: &CudaDevice) -> Result<Self> {
        let layout = |format| Layout::new(format, shape.head_dim, store.group).map_err(refused);
        let slab = [layout(Format::F16)?.slab_bytes(), layout(store.format)?.slab_bytes()];
        let room = packed_slabs(shape.context, store.window).max(1);
        let entry = |i| Entry::new(store.format, i).0;
        let table: Vec<u32> = (0..(shape.kv_heads * room) as u32).map(entry).collect();
        let layer = Self {
            store,
            shape,
            slab,
            room,
            len: 0,
            pool: device.alloc_zeros(shape.kv_heads * room * slab[1])?,
            table: device.clone_htod(&table)?,
            ring: device.alloc_zeros(shape.kv_heads * ring_slabs(store.window).max(1) * slab[0])?,
            lens: device.alloc_zeros(1)?,
            packed: device.alloc_zeros(1)?,
            workspace: device.alloc_zeros(1)?,
            device: device.clone(),
        };
        // SAFETY: the function reads numbers alone.
        let bytes = unsafe {
            ffi::kvw_paged_attn_workspace(&layer.decode(layer.cache(layer.ring_slabs())))
        };
        Ok(Self { workspace: device.alloc_zeros(bytes.max(1))?, ..layer })
    }

    pub fn bytes(&self) -> usize {
        let packed = packed_slabs(self.len, self.store.window) * self.shape.kv_heads;
        self.ring.len() + packed * self.slab[1]
    }

    /// Appends `n` tokens and attends: `q` `[n, q_heads, D]`, `k` and `v` `[n, kv_heads, D]`.
    pub fn attend(
        &mut self,
        n: usize,
        q: &CudaView<'_, f16>,
        k: &CudaView<'_, f16>,
        v: &CudaView<'_, f16>,
    ) -> Result<CudaSlice<f16>> {
        let (before, context) = (self.len, self.shape.context);
        if before + n > context {
            bail!("k: {n} tokens after {before}; supported: {context} in all");
        }
        self.len += n;
        self.device.memcpy_htod(&[self.len as i32], &mut self.lens)?;
        // SAFETY: every element is written below.
        let mut out = unsafe { self.device.alloc::<f16>(q.len()) }?;
        match n {
            0 => {}
            1 => self.append(q, k, v, &mut out)?,
            _ => self.extend(n, before, q, k, v, &mut out)?,
        }
        Ok(out)
    }

    /// Numbers of the cache, with a ring of `slabs` slabs; pointers are missing.
    fn cache(&self, slabs: usize) -> ffi::kvw_cache {
        ffi::kvw_cache {
            seqs: 1,
            kv_heads: self.shape.kv_heads as i32,
            head_dim: self.shape.head_dim as i32,
            group: self.store.group as i32,
            window: self.store.window as i32,
            ring_slabs: slabs as i32,
            table_stride: self.room as i32,
            table_heads: self.shape.kv_heads as i32,
            lens_heads: 1,
            ..Default::default()
        }
    }

    /// Numbers of a decode step.
    fn decode(&self, cache: ffi::kvw_cache) -> paged_attn::Args {
        paged_attn::Args {
            struct_size: size_of::<paged_attn::Args>() as u32,
            cache,
            q_heads: self.shape.q_heads as i32,
            q_len: 1,
            max_slabs: self.shape.context.div_ceil(TOKENS) as i32,
            dtype: ffi::KVW_F16,
            ..Default::default()
        }
    }

    /// Numbers of `op` on `n` tokens.
    fn pack(&self, op: i32, cache: ffi::kvw_cache, n: usize) -> kv_pack::Args {
        let stride = (self.shape.kv_heads * self.shape.head_dim) as i64;
        let (k_stride, v_stride, tokens) = (stride, stride, n as i32);
        kv_pack::Args {
            op,
            cache,
            k_stride,
            v_stride,
            tokens,
            dtype: ffi::KVW_F16,
            ..Default::default()
        }
    }

    /// Slabs of the ring.
    fn ring_slabs(&self) -> usize {
        self.ring.len() / self.slab[0] / self.shape.kv_heads
    }

    /// One token, and the slab that it pushes out of the window.
    fn append(
        &mut self,
        q: &CudaView<'_, f16>,
        k: &CudaView<'_, f16>,
        v: &CudaView<'_, f16>,
        out: &mut CudaSlice<f16>,
    ) -> Result<()> {
        let on = self.device.cuda_stream();
        let cache = self.cache(self.ring_slabs());
        let (pack, attn) = (self.pack(ffi::KVW_PACK_APPEND, cache, 1), self.decode(cache));
        let (q, k, v, out) = (read(q, &on), read(k, &on), read(v, &on), write(out, &on));
        let (pool, ring) = (write(&mut self.pool, &on), write(&mut self.ring, &on));
        let (table, lens) = (read(&self.table, &on), read(&self.lens, &on));
        let workspace = write(&mut self.workspace, &on);
        let mut cache = ffi::kvw_cache {
            ring: ring.ptr().cast(),
            table: table.ptr(),
            lens: lens.ptr(),
            ..cache
        };
        cache.pools[self.store.format as usize] = pool.ptr().cast();
        let pack = kv_pack::Args { cache, k: k.ptr().cast(), v: v.ptr().cast(), ..pack };
        let attn = paged_attn::Args {
            cache,
            q: q.ptr().cast(),
            out: out.ptr().cast(),
            workspace: workspace.ptr().cast(),
            workspace_bytes: workspace.len(),
            ..attn
        };
        let on = stream(&on).map_err(refused)?;
        // SAFETY: the views hold what the headers ask for and live until both ops are enqueued; the stream orders them.
        unsafe { kv_pack::run(&pack, on).and_then(|()| paged_attn::run(&attn, on)) }
            .map_err(refused)
    }

    /// Many tokens: their attention is exact, what leaves the window is packed after it. Until then all that is f16 lies
    /// in a longer ring.
    fn extend(
        &mut self,
        n: usize,
        before: usize,
        q: &CudaView<'_, f16>,
        k: &CudaView<'_, f16>,
        v: &CudaView<'_, f16>,
        out: &mut CudaSlice<f16>,
    ) -> Result<()> {
        let done = packed_slabs(before, self.store.window);
        let after = packed_slabs(self.len, self.store.window);
        let slabs = (self.len.div_ceil(TOKENS) - done).max(self.ring_slabs());
        let mut staged =
            self.device.alloc_zeros::<u8>(self.shape.kv_heads * slabs * self.slab[0])?;
        self.move_ring(&self.ring, &mut staged, done..before.div_ceil(TOKENS))?;
        self.device.memcpy_htod(&[done as i32], &mut self.packed)?;
        let starts = self.device.clone_htod(&[0, n as i32])?;

        let (on, cache) = (self.device.cuda_stream(), self.cache(slabs));
        let fill = self.pack(ffi::KVW_PACK_FILL, cache, n);
        let flush = self.pack(ffi::KVW_PACK_FLUSH, cache, n);
        {
            let (q, k, v, out) = (read(q, &on), read(k, &on), read(v, &on), write(out, &on));
            let (pool, ring) = (write(&mut self.pool, &on), write(&mut staged, &on));
            let (table, lens) = (read(&self.table, &on), read(&self.lens, &on));
            let (packed, starts) = (read(&self.packed, &on), read(&starts, &on));
            let mut cache = ffi::kvw_cache {
                ring: ring.ptr().cast(),
                table: table.ptr(),
                lens: lens.ptr(),
                packed: packed.ptr(),
                ..cache
            };
            cache.pools[self.store.format as usize] = pool.ptr().cast();
            let fill = kv_pack::Args {
                cache,
                k: k.ptr().cast(),
                v: v.ptr().cast(),
                cu_tokens: starts.ptr(),
                max_tokens: n as i32,
                ..fill
            };
            let attn = prefill_attn::Args {
                cache,
                q: q.ptr().cast(),
                out: out.ptr().cast(),
                cu_tokens: starts.ptr(),
                q_heads: self.shape.q_heads as i32,
                tokens: n as i32,
                max_tokens: n as i32,
                dtype: ffi::KVW_F16,
                ..Default::default()
            };
            let first = packed.ptr();
            let cache = ffi::kvw_cache { packed: std::ptr::null(), ..cache };
            let flush = kv_pack::Args { cache, first, max_tokens: (after - done) as i32, ..flush };
            let on = stream(&on).map_err(refused)?;
            // SAFETY: as in `append`.
            let enqueued = unsafe {
                kv_pack::run(&fill, on)
                    .and_then(|()| prefill_attn::run(&attn, on))
                    .and_then(|()| if after > done { kv_pack::run(&flush, on) } else { Ok(()) })
            };
            enqueued.map_err(refused)?;
        }
        let mut ring = self.device.alloc_zeros::<u8>(self.ring.len())?;
        self.move_ring(&staged, &mut ring, after..self.len.div_ceil(TOKENS))?;
        self.ring = ring;
        Ok(())
    }

    /// Copies slabs between rings of different lengths: slab `i` lies at `i` modulo their number.
    fn move_ring(
        &self,
        from: &CudaSlice<u8>,
        to: &mut CudaSlice<u8>,
        slabs: std::ops::Range<usize>,
    ) -> Result<()> {
        let (bytes, heads) = (self.slab[0], self.shape.kv_heads);
        let place = |len: usize, h: usize, i: usize| {
            let of_head = len / heads;
            let at = h * of_head + i * bytes % of_head;
            at..at + bytes
        };
        for (h, i) in (0..heads).flat_map(|h| slabs.clone().map(move |i| (h, i))) {
            let source = from.slice(place(from.len(), h, i));
            let target = place(to.len(), h, i);
            self.device.memcpy_dtod(&source, &mut to.slice_mut(target))?;
        }
        Ok(())
    }
}
