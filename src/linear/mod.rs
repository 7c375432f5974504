//! `y = x W^T` with `W` kept in the block format of its GGUF file.
//!
//! Few tokens (decode) go row by row: a worker streams its rows once, bound by memory. Many tokens
//! (prefill) go in panels: 16 rows are unpacked and interleaved once, then used for all tokens.
//! Quantised weights meet activations in 8 bits ([`Activations::Q8`], integer dot products) or in
//! floats ([`Activations::F32`], weights decoded); float weights always meet floats.

mod blocks;
#[cfg(kvw_cuda)]
pub mod cuda;
mod gemm;
mod gemv;
mod kind;
pub mod oracle;
mod out;
mod panel;
mod planes;
mod q8;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use kind::{WeightType, Weights};
pub use planes::planes;

use crate::error::{Error, Result};
use crate::simd::Level;
use crate::threads::Team;
use out::Out;
use std::cell::RefCell;

/// Up to this many tokens, rows are decoded where they are used; above, in panels.
const FEW: usize = 4;

/// In which form activations meet quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activations {
    /// Floats: weights are decoded to f32, as exact as f32 sums are.
    F32,
    /// Rounded to 8 bits in blocks of 32, several times faster.
    Q8,
}

/// How to run on the CPU.
#[derive(Clone, Copy)]
pub struct Cpu<'a> {
    /// Threads that share the rows.
    pub team: &'a Team,
    /// Vector instructions; lowered to what this CPU has.
    pub level: Level,
    /// Form of the activations.
    pub activations: Activations,
    /// A token's product has the same bits whatever else is in `x`; slower for many tokens.
    pub alone: bool,
}

impl<'a> Cpu<'a> {
    /// The fast defaults: 8-bit activations and the best instructions.
    #[must_use]
    pub fn new(team: &'a Team) -> Self {
        Self { team, level: Level::detect(), activations: Activations::Q8, alone: false }
    }
}

/// `y[n, rows] = x[n, cols] W^T`.
///
/// # Errors
/// [`Error::Len`] if `x` is not `n * cols` or `y` not `n * rows` elements.
pub fn matmul(
    cpu: &Cpu<'_>,
    weights: &Weights<'_>,
    x: &[f32],
    n: usize,
    y: &mut [f32],
) -> Result<()> {
    matmul_many(cpu, &mut [(weights, y)], x, n)
}

/// Several products of the same `x[n, cols]`: it is quantised once and the threads start once, for
/// q, k, v or for gate and up.
///
/// # Errors
/// [`Error::Len`] for wrong lengths, [`Error::Unsupported`] where the matrices differ in `cols`.
pub fn matmul_many(
    cpu: &Cpu<'_>,
    products: &mut [(&Weights<'_>, &mut [f32])],
    x: &[f32],
    n: usize,
) -> Result<()> {
    let Some(cols) = products.first().map(|(weights, _)| weights.cols()) else { return Ok(()) };
    check_len("x", n.checked_mul(cols), x.len())?;
    for (weights, y) in products.iter() {
        check_len("y", n.checked_mul(weights.rows()), y.len())?;
        if weights.cols() != cols {
            return Err(Error::Unsupported {
                op: "linear",
                field: "cols",
                got: format!("{} beside {cols}", weights.cols()),
                supported: "matrices that share x have equally many columns",
            });
        }
    }
    let jobs: Vec<_> =
        products.iter_mut().map(|(w, y)| Job { weights: **w, y: Out::new(y, w.rows()) }).collect();
    ACTIVATIONS.with(|cell| {
        // Taken out while in use: a body that enters `linear` again on this thread gets its own.
        let mut buffers = cell.take();
        multiply(cpu, &jobs, x, n, &mut buffers);
        cell.replace(buffers);
    });
    Ok(())
}

fn check_len(buffer: &'static str, need: Option<usize>, got: usize) -> Result<()> {
    match need {
        Some(need) if need == got => Ok(()),
        Some(need) => Err(Error::Len { op: "linear", buffer, need, got }),
        None => Err(Error::TooBig { op: "linear", size: usize::MAX }),
    }
}

/// Decodes one row of `weights` to its `cols` floats: an embedding, for one.
///
/// # Errors
/// [`Error::Len`] if `out` is not `cols` elements, [`Error::Unsupported`] for a row beyond the last.
pub fn dequantize_row(weights: &Weights<'_>, row: usize, out: &mut [f32]) -> Result<()> {
    check_len("out", Some(weights.cols()), out.len())?;
    if row >= weights.rows() {
        return Err(Error::Unsupported {
            op: "linear",
            field: "row",
            got: row.to_string(),
            supported: "rows of the matrix, counted from 0",
        });
    }
    blocks::dequantize(Level::detect(), weights.kind(), weights.row(row), out);
    Ok(())
}

/// One checked product.
struct Job<'a> {
    weights: Weights<'a>,
    y: Out<'a>,
}

/// Quantised activations of a call, kept for the next.
#[derive(Default)]
struct Buffers {
    rows: Vec<q8::Block<1>>,
    groups: Vec<q8::Block<{ q8::GROUP }>>,
}

thread_local! {
    static ACTIVATIONS: RefCell<Buffers> = RefCell::default();
}

fn multiply(cpu: &Cpu<'_>, jobs: &[Job<'_>], x: &[f32], n: usize, buffers: &mut Buffers) {
    let cols = jobs[0].weights.cols();
    let integer =
        |job: &Job<'_>| cpu.activations == Activations::Q8 && job.weights.kind().quant().is_some();
    let any_integer = jobs.iter().any(integer);
    if n == 0 {
        return;
    }
    if n <= FEW || cpu.alone {
        if any_integer {
            q8::rows(cpu.level, x, cols, &mut buffers.rows);
        }
        let units = Units::new(jobs, |w| gemv::rows_at_once(w, cpu.team));
        cpu.team.each(units.count, |unit| {
            let (job, rows) = units.get(unit, jobs);
            let q = integer(job).then_some(&*buffers.rows);
            gemv::rows(cpu.level, &job.weights, rows, x, q, &job.y);
        });
    } else {
        if any_integer {
            q8::groups(cpu.level, cpu.team, x, cols, &mut buffers.groups);
        }
        let units = Units::new(jobs, |_| panel::ROWS);
        cpu.team.each(units.count, |unit| {
            let (job, rows) = units.get(unit, jobs);
            let q = integer(job).then_some(&*buffers.groups);
            gemm::rows(cpu.level, &job.weights, rows, x, q, &job.y);
        });
    }
}

/// The rows of all products, cut into pieces that one worker takes at a time.
struct Units {
    /// Rows a unit and first unit of each job.
    jobs: Vec<(usize, usize)>,
    count: usize,
}

impl Units {
    fn new(jobs: &[Job<'_>], rows_of: impl Fn(&Weights<'_>) -> usize) -> Self {
        let mut count = 0;
        let cut = |job: &Job<'_>| {
            let rows = rows_of(&job.weights);
            let first = count;
            count += job.weights.rows().div_ceil(rows);
            (rows, first)
        };
        let jobs = jobs.iter().map(cut).collect();
        Self { jobs, count }
    }

    fn get<'j, 'a>(
        &self,
        unit: usize,
        jobs: &'j [Job<'a>],
    ) -> (&'j Job<'a>, std::ops::Range<usize>) {
        let index = self.jobs.partition_point(|&(_, first)| first <= unit) - 1;
        let (rows, first) = self.jobs[index];
        let start = (unit - first) * rows;
        (&jobs[index], start..(start + rows).min(jobs[index].weights.rows()))
    }
}
