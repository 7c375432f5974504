//! The plain layers of Llama-3-8B, one token and sixteen: bytes are the limit of each.

use super::cache::Noise;
use super::card::{Card, Launch};
use super::case::{Case, Ready, copies};
use anyhow::Result;
use half::f16;
use kvwarp::ffi::{self, KVW_F16, KVW_ROPE_HALF};
use kvwarp::{embed, linear, rms_norm, rope_select, sample, swiglu};
use std::sync::OnceLock;

const WIDTH: usize = 4096;
const INNER: usize = 14336;
const VOCAB: usize = 128_256;

/// A case of `tokens` tokens whose `args(card)` gives params for each copy; `$bytes` counts one.
macro_rules! case {
    ($family:ident, $bytes:ident, $format:expr, $shape:expr, $tokens:expr, $size:expr, $args:expr) => {{
        let args = $args;
        let prepare = move |card: &Card| -> Result<Ready> {
            let all = (0..copies(card, $size)).map(|_| args(card)).collect::<Result<Vec<_>>>()?;
            // SAFETY: live params; nothing behind their pointers is read.
            let bytes = unsafe { ffi::$bytes(&all[0]) };
            let launch = |args| -> Launch {
                // SAFETY: the arena keeps everything until the next case.
                Box::new(move |stream| unsafe { $family::run(&args, stream) })
            };
            let launches = all.into_iter().map(launch).collect();
            Ok(Ready { launches, bytes, operations: 0.0, output: None })
        };
        let name = format!("{}x{}", $tokens, $shape);
        Case::new(stringify!($family), $format, &name, Box::new(prepare))
    }};
}

/// A megabyte of numbers, repeated over larger tensors.
fn noise() -> &'static [f16] {
    static NOISE: OnceLock<Vec<f16>> = OnceLock::new();
    NOISE.get_or_init(|| Noise(5).halves(1 << 19, 0.5))
}

/// `n` halves.
fn halves(card: &Card, n: usize) -> Result<u64> {
    let at = card.take(2 * n)?;
    card.fill(at, bytemuck::cast_slice(noise()), 2 * n)?;
    Ok(at)
}

/// `n` floats.
fn floats(card: &Card, n: usize) -> Result<u64> {
    static NOISE: OnceLock<Vec<f32>> = OnceLock::new();
    let noise = NOISE.get_or_init(|| noise().iter().map(|x| x.to_f32()).collect());
    let at = card.take(4 * n)?;
    card.fill(at, bytemuck::cast_slice(noise), 4 * n)?;
    Ok(at)
}

mod gemv {
    pub use kvwarp::linear::cuda::run;
}

fn products(tokens: usize) -> Vec<Case> {
    let sizes = [(WIDTH, WIDTH), (1024, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (VOCAB, WIDTH)];
    let case = |(rows, cols): (usize, usize)| {
        let args = move |card: &Card| -> Result<linear::cuda::Args> {
            Ok(linear::cuda::Args {
                struct_size: size_of::<linear::cuda::Args>() as u32,
                dtype: KVW_F16,
                weight: halves(card, rows * cols)? as _,
                x: halves(card, tokens * cols)? as _,
                y: card.zeros(2 * tokens * rows)? as _,
                y_dtype: KVW_F16,
                tokens: tokens as i32,
                rows: rows as i32,
                cols: cols as i32,
                ..Default::default()
            })
        };
        let shape = format!("{rows}x{cols}");
        let mut case =
            case!(gemv, kvw_linear_bytes, "f16", shape, tokens, 2 * rows * (cols + tokens), args);
        case.row.family = "linear".into();
        case
    };
    sizes.map(case).into()
}

fn norm(tokens: usize) -> Case {
    let args = move |card: &Card| -> Result<rms_norm::Args> {
        Ok(rms_norm::Args {
            struct_size: size_of::<rms_norm::Args>() as u32,
            eps: 1e-5,
            x: floats(card, tokens * WIDTH)? as _,
            weight: floats(card, WIDTH)? as _,
            out: card.zeros(2 * tokens * WIDTH)? as _,
            tokens: tokens as i32,
            width: WIDTH as i32,
        })
    };
    case!(rms_norm, kvw_rms_norm_bytes, "f32", WIDTH, tokens, 6 * tokens * WIDTH, args)
}

fn activation(tokens: usize) -> Case {
    let args = move |card: &Card| -> Result<swiglu::Args> {
        Ok(swiglu::Args {
            struct_size: size_of::<swiglu::Args>() as u32,
            tokens: tokens as i32,
            gate: halves(card, tokens * INNER)? as _,
            up: halves(card, tokens * INNER)? as _,
            out: card.zeros(2 * tokens * INNER)? as _,
            in_stride: INNER as i64,
            width: INNER as i32,
            ..Default::default()
        })
    };
    case!(swiglu, kvw_swiglu_bytes, "f16", INNER, tokens, 6 * tokens * INNER, args)
}

fn rope(tokens: usize) -> Case {
    let args = move |card: &Card| -> Result<rope_select::Args> {
        let x = halves(card, tokens * WIDTH)?;
        let positions: Vec<i32> = (0..tokens as i32).collect();
        Ok(rope_select::Args {
            struct_size: size_of::<rope_select::Args>() as u32,
            pairing: KVW_ROPE_HALF,
            x: x as _,
            out: card.zeros(2 * tokens * WIDTH)? as _,
            positions: card.upload(&positions)? as _,
            inv_freq: card.upload(&[0.01f32; 64])? as _,
            x_stride: WIDTH as i64,
            out_stride: WIDTH as i64,
            tokens: tokens as i32,
            heads: 32,
            head_dim: 128,
            ..Default::default()
        })
    };
    case!(rope_select, kvw_rope_select_bytes, "f16", WIDTH, tokens, 4 * tokens * WIDTH, args)
}

fn lookup(tokens: usize) -> Case {
    let args = move |card: &Card| -> Result<embed::Args> {
        let ids: Vec<i32> = (0..tokens).map(|i| (i * 7919 % 8192) as i32).collect();
        Ok(embed::Args {
            struct_size: size_of::<embed::Args>() as u32,
            dtype: KVW_F16,
            table: halves(card, 8192 * WIDTH)? as _,
            ids: card.upload(&ids)? as _,
            out: card.zeros(4 * tokens * WIDTH)? as _,
            tokens: tokens as i32,
            vocab: 8192,
            width: WIDTH as i32,
            ..Default::default()
        })
    };
    case!(embed, kvw_embed_bytes, "f16", WIDTH, tokens, 2 * 8192 * WIDTH, args)
}

/// Greedy, and a draw with every truncation.
fn draw(name: &str, seqs: usize, temperature: f32, top_k: i32) -> Case {
    let args = move |card: &Card| -> Result<sample::Args> {
        Ok(sample::Args {
            struct_size: size_of::<sample::Args>() as u32,
            seqs: seqs as i32,
            logits: floats(card, seqs * VOCAB)? as _,
            tokens: card.zeros(4 * seqs)? as _,
            seeds: card.upload(&vec![7u64; seqs])? as _,
            steps: card.zeros(4 * seqs)? as _,
            temperature: card.upload(&vec![temperature; seqs])? as _,
            top_p: card.upload(&vec![0.95f32; seqs])? as _,
            min_p: card.upload(&vec![0.02f32; seqs])? as _,
            top_k: card.upload(&vec![top_k; seqs])? as _,
            vocab: VOCAB as i32,
            ..Default::default()
        })
    };
    case!(sample, kvw_sample_bytes, name, VOCAB, seqs, 4 * seqs * VOCAB, args)
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for tokens in [1, 16] {
        all.extend(products(tokens));
        all.extend([norm(tokens), activation(tokens), rope(tokens), lookup(tokens)]);
        all.extend([draw("greedy", tokens, 0.0, 0), draw("top_k50", tokens, 0.8, 50)]);
    }
    all
}
