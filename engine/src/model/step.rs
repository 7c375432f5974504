//! One layer of a forward pass.

use kvwarp::linear::matmul;
use kvwarp::rope_select::Angles;
use kvwarp::{hadamard, paged_attn, prefill_attn, rms_norm, swiglu};

use super::layers::Layer;
use super::rows::{each_row, project, residual, row};
use super::work::Work;
use super::{Model, ModelError};
use crate::cache::Cache;

/// Some rows of a prompt on their way through a layer.
pub(super) struct Piece<'a> {
    /// Residual stream, `[rows, width]`.
    pub x: &'a mut [f32],
    pub angles: &'a Angles,
    /// First row in `angles`.
    pub first: usize,
    pub rows: usize,
    /// The layer's ring is staged for many tokens.
    pub staged: bool,
}

impl Model<'_> {
    /// One layer, in the order of the math.
    pub(super) fn layer(
        &self,
        index: usize,
        layer: &Layer<'_>,
        piece: Piece<'_>,
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let Piece { x, angles, first, rows, staged } = piece;
        let (cpu, eps) = (self.cpu(), self.config.rms_eps);
        work.resize(self.config, rows);
        let Work { h, q, k, v, mix, gate, up, add, calibration, .. } = work;
        let (d, turned) = (self.config.head_dim, cache.spec().hadamard);
        let turn_keys = |_, x: &mut [f32]| {
            hadamard::keys(x, d);
            Ok(())
        };
        let turn_values = |_, x: &mut [f32]| {
            hadamard::values(x);
            Ok(())
        };

        let team = &self.team;
        each_row(team, h, rows, |i, h| rms_norm::cpu(row(x, i, rows), &layer.attn_norm, eps, h))?;
        project(&cpu, [&layer.q, &layer.k, &layer.v], h, rows, [q, k, v])?;
        each_row(team, q, rows, |i, q| angles.rotate(first + i, q, self.pairing))?;
        each_row(team, k, rows, |i, k| angles.rotate(first + i, k, self.pairing))?;
        if let Some(calibration) = calibration {
            calibration.add(index, q, rows, team);
        }
        if turned {
            each_row(team, q, rows, turn_keys)?;
            each_row(team, k, rows, turn_keys)?;
            each_row(team, v, rows, turn_values)?;
        }
        if staged {
            cache.fill(index, k, v, rows);
            let views = cache.staged_views(index);
            prefill_attn::cpu(team, q, rows, &views, 0.0, self.mask, mix, None, &mut work.prefill)?;
        } else {
            cache.append(index, k, v)?;
            paged_attn::cpu(team, q, &cache.views(index), 0.0, self.mask, mix, &mut work.decode)?;
        }
        if turned {
            each_row(team, mix, rows, turn_values)?;
        }
        matmul(&cpu, &layer.o.weights, mix, rows, add)?;
        residual(x, add);

        each_row(team, h, rows, |i, h| rms_norm::cpu(row(x, i, rows), &layer.ffn_norm, eps, h))?;
        project(&cpu, [&layer.gate, &layer.up], h, rows, [gate, up])?;
        each_row(team, gate, rows, |i, gate| swiglu::cpu(gate, row(up, i, rows)))?;
        matmul(&cpu, &layer.down.weights, gate, rows, add)?;
        residual(x, add);
        Ok(())
    }
}
