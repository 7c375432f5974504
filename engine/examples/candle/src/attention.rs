//! Attention over a layer's cache as an op of candle.

use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape as Dims, bail};
use kvwarp::slab::Format;

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;

/// How keys and values are kept: the newest `window` tokens in f16, older ones in `format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Store {
    pub format: Format,
    pub window: usize,
    /// Elements that share a scale and a minimum.
    pub group: usize,
}

impl FromStr for Store {
    type Err = Error;

    /// `f16`, `q8`, `q4` or `q2`: KIVI's quantiser on keys as they are, 128 tokens in f16; `window=N` and `group=N` may
    /// follow. `q2` is what the program calls `q2-kivi`.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let (format, window) = match parts.next().unwrap_or_default() {
            "f16" => (Format::F16, 0),
            "q8" => (Format::Q8, 128),
            "q4" => (Format::Q4, 128),
            "q2" => (Format::Q2, 128),
            other => bail!("cache: no store {other:?}; supported: f16, q8, q4, q2"),
        };
        let mut store = Self { format, window, group: 32 };
        for part in parts {
            match part.split_once('=').map(|(name, value)| (name, value.parse())) {
                Some(("window", Ok(value))) => store.window = value,
                Some(("group", Ok(value))) => store.group = value,
                _ => bail!("cache: {part:?} is no part; supported: window=N, group=N"),
            }
        }
        Ok(store)
    }
}

/// Heads of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Most tokens, for which a GPU has room from the beginning.
    pub context: usize,
}

enum Layer {
    Cpu(cpu::Layer),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Layer),
}

/// Keys and values of one layer of one sequence, and attention to them.
///
/// `q.apply_op3_no_bwd(&k, &v, &attention)` appends the tokens of `k` and `v`, both `[T, kv_heads, head_dim]` and rotated, and
/// gives `[T, q_heads * head_dim]`: what each row of `q`, `[T, q_heads, head_dim]`, makes of the tokens up to its own. All
/// are dense: f32 on the processor, f16 on a GPU. A call appends, so it is not to be repeated.
pub struct Attention {
    shape: Shape,
    layer: Mutex<Layer>,
}

impl Attention {
    /// An empty cache where `device` is.
    pub fn new(store: Store, shape: Shape, device: &Device) -> Result<Self> {
        let layer = match device {
            Device::Cpu => Layer::Cpu(cpu::Layer::new(store, shape).map_err(Error::wrap)?),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Layer::Cuda(cuda::Layer::new(store, shape, device)?),
            _ => bail!("device: {device:?}; supported: the processor, and CUDA with feature cuda"),
        };
        Ok(Self { shape, layer: Mutex::new(layer) })
    }

    /// Bytes of slabs and rings in use.
    pub fn bytes(&self) -> usize {
        match &*self.layer.lock().unwrap_or_else(PoisonError::into_inner) {
            Layer::Cpu(layer) => layer.bytes(),
            #[cfg(feature = "cuda")]
            Layer::Cuda(layer) => layer.bytes(),
        }
    }

    /// Tokens of a call whose operands have these layouts, and where their elements lie.
    fn rows(&self, [q, k, v]: [&Layout; 3]) -> Result<(usize, [(usize, usize); 3])> {
        let Shape { q_heads, kv_heads, head_dim, .. } = self.shape;
        let tokens = q.dims().first().copied().unwrap_or_default();
        let mut at = [(0, 0); 3];
        for ((name, layout, heads), at) in
            [("q", q, q_heads), ("k", k, kv_heads), ("v", v, kv_heads)].into_iter().zip(&mut at)
        {
            let want = [tokens, heads, head_dim];
            let Some(offsets) = layout.contiguous_offsets().filter(|_| layout.dims() == want)
            else {
                bail!("{name}: {:?}; a dense {want:?} is wanted", layout.shape())
            };
            *at = offsets;
        }
        Ok((tokens, at))
    }

    fn out(&self, tokens: usize) -> Dims {
        Dims::from((tokens, self.shape.q_heads * self.shape.head_dim))
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "kvwarp-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Dims)> {
        let (tokens, at) = self.rows([q_layout, k_layout, v_layout])?;
        let [q, k, v] = [(q, at[0]), (k, at[1]), (v, at[2])]
            .map(|(x, (from, to))| x.as_slice::<f32>().map(|x| &x[from..to]));
        let mut layer = self.layer.lock().unwrap_or_else(PoisonError::into_inner);
        let out = match &mut *layer {
            Layer::Cpu(layer) => layer.attend(tokens, q?, k?, v?).map_err(Error::wrap)?,
            #[cfg(feature = "cuda")]
            Layer::Cuda(_) => bail!("q: on the processor, the cache on a GPU"),
        };
        Ok((CpuStorage::F32(out), self.out(tokens)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Dims)> {
        let (tokens, at) = self.rows([q_layout, k_layout, v_layout])?;
        let [q_slice, k, v] = [(q, at[0]), (k, at[1]), (v, at[2])]
            .map(|(x, (from, to))| x.as_cuda_slice::<half::f16>().map(|x| x.slice(from..to)));
        let mut layer = self.layer.lock().unwrap_or_else(PoisonError::into_inner);
        let Layer::Cuda(layer) = &mut *layer else {
            bail!("q: on a GPU, the cache on the processor")
        };
        let out = layer.attend(tokens, &q_slice?, &k?, &v?)?;
        let out = candle_core::CudaStorage::wrap_cuda_slice(out, q.device.clone());
        Ok((out, self.out(tokens)))
    }
}
