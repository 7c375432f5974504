//! A step of all sequences that are being continued: the same launches whatever their lengths are.

use kvwarp::ffi::{KVW_F16, KVW_PACK_APPEND, KVW_PACK_FILL};

use super::Gpu;
use super::control::{Grid, Placed, Places, edit};
use super::ops::{FEW_ROWS, at, params};
use super::platform::Result;
use crate::runner::{Row, RunError, Turn};

impl Gpu {
    /// Turns of `each` tokens; returns each one's choices.
    pub(super) fn run(
        &mut self,
        turns: &[&Turn<'_>],
        each: usize,
    ) -> Result<Vec<Vec<u32>>, RunError> {
        let highest = turns.iter().map(|turn| turn.row.0).max().unwrap_or(0);
        let grid = Grid { rows: (highest + 1).next_power_of_two(), each };
        let (mut edits, mut placed) = (Vec::new(), Vec::new());
        for &turn in turns {
            let before = self.cache.all_held(turn.row);
            for (h, held) in before.iter().enumerate() {
                self.cache.extend(turn.row, h, held.len + each, &mut edits)?;
            }
            let after = self.cache.all_held(turn.row);
            let (apart, heads) = (self.control.apart(), self.cache.heads());
            let heads = apart.pick(&before, heads).zip(apart.pick(&after, heads));
            let heads = heads.map(|(b, a)| (b.len, [b.packed, a.packed])).collect();
            placed.push(Placed { turn, position: self.cache.len(turn.row), heads });
        }
        self.control.write(&self.platform, grid, &placed, &edits)?;
        self.launch(grid)?;
        turns.iter().for_each(|turn| self.cache.advance(turn.row, each));
        self.last = Some(grid);
        let mut chosen = vec![0u32; grid.tokens()];
        self.platform.read(self.chosen.at(), bytemuck::cast_slice_mut(&mut chosen))?;
        turns.iter().try_for_each(|turn| self.drop_by_lag(turn.row))?;
        self.pack_latents(turns.iter().map(|turn| turn.row))?;
        let of = |turn: &&Turn<'_>| chosen[turn.row.0 * each..][..each].to_vec();
        Ok(turns.iter().map(of).collect())
    }

    /// Enqueues a step: the first of its shape as it is, which loads the kernels and libraries that a recording could
    /// not wait for, and later ones by a recording where the platform has them and nobody wants to know of each launch.
    fn launch(&mut self, grid: Grid) -> Result<()> {
        if self.platform.is_timing() {
            return self.body(grid);
        }
        match self.recorded.get(&grid) {
            Some(Some(replay)) => replay.launch(),
            Some(None) => self.body(grid),
            None => {
                self.body(grid)?;
                let replay = self.platform.record(&mut || self.body(grid))?;
                self.recorded.insert(grid, replay);
                Ok(())
            }
        }
    }

    /// Everything between the control block and the chosen tokens.
    fn body(&self, grid: Grid) -> Result<()> {
        let (net, tokens) = (&self.net, grid.tokens());
        let (x, places) = (net.work.x.at(), self.control.places(grid));
        let place = |place| self.control.at(place);
        let list = (place(places.count), place(places.edits));
        edit(&net.ops, self.cache.table(), list, self.cache.edits(grid.rows))?;
        net.ops.embed(
            &net.weights.embedding,
            place(places.ids),
            (x, kvwarp::ffi::KVW_F32),
            tokens,
        )?;
        for (index, layer) in net.weights.layers.iter().enumerate() {
            net.project(layer, x, tokens)?;
            if grid.each > 1 || layer.latent.is_some() {
                net.rotate(layer, place(places.positions), tokens)?;
            }
            match self.cache.latents(index, Row(0), grid.rows, place(places.lens(index))) {
                Some(latents) => {
                    net.put(layer, latents, place(places.firsts), [tokens, grid.each])?;
                    let slabs = self.cache.table_slabs();
                    net.attend_to_latents(layer, latents, [grid.each, slabs], &self.scratch)?;
                }
                None => {
                    net.expand(layer, tokens)?;
                    self.append(index, grid, &places)?;
                    self.attend(index, grid, &places)?;
                }
            }
            net.finish(layer, x, tokens)?;
        }
        let row_bytes = 4 * net.config.width;
        for first in (0..tokens).step_by(FEW_ROWS) {
            let rows = FEW_ROWS.min(tokens - first);
            net.logits(x + (first * row_bytes) as u64, rows)?;
            self.choose(&places, first, rows)?;
        }
        Ok(())
    }

    /// Keys and values into the rings. A single token is rotated, with its queries, as it is written; a slab that leaves
    /// the window with it is packed.
    fn append(&self, layer: usize, grid: Grid, places: &Places) -> Result<()> {
        let cache = self.cache.view(layer, grid.rows, self.told(layer, places, 0));
        let op = if grid.each == 1 { KVW_PACK_APPEND } else { KVW_PACK_FILL };
        let weights = &self.net.weights.layers[layer];
        let mut params = self.net.packing(weights, op, cache, grid.tokens());
        if grid.each == 1 && weights.latent.is_none() {
            self.net.rotating(weights, &mut params, self.control.at(places.positions));
        }
        params.cu_tokens = at(self.control.at(places.firsts));
        params.max_tokens = grid.each as i32;
        params.feedback = at(self.cache.feedback(layer));
        params.range = self.cache.range();
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    /// Addresses of a layer's lengths and, where lengths alone do not say it, of the slabs in its table: before the new
    /// tokens (0) or with them (1).
    fn told(&self, layer: usize, places: &Places, with: usize) -> [u64; 2] {
        let packed = self.control.at(places.packed(layer)[with]);
        let lag = self.cache.spec().lag().is_some();
        [self.control.at(places.lens(layer)), if lag { packed } else { 0 }]
    }

    fn attend(&self, layer: usize, grid: Grid, places: &Places) -> Result<()> {
        let params = kvwarp::ffi::kvw_paged_attn_params {
            cache: self.cache.view(layer, grid.rows, self.told(layer, places, 1)),
            q: at(self.net.queries()),
            out: at(self.net.work.mix.at()),
            workspace: at(self.scratch.at()),
            workspace_bytes: self.scratch.bytes(),
            ..self.attention(grid)
        };
        self.net.ops.run(|k| &k.paged_attn, &params)
    }

    /// Scratch bytes of a step's attention, in any layer.
    pub(super) fn workspace(&self, grid: Grid) -> usize {
        let (kernels, shape) = (self.platform.kernels(), [grid.each, self.cache.table_slabs()]);
        let of_latents = |layer| {
            let latents = self.cache.latents(layer, Row(0), grid.rows, self.control.at(0))?;
            Some(kernels.lowrank_kv_workspace(&self.net.latent_attention(latents, shape)))
        };
        match (0..self.net.config.layers).map(of_latents).max().flatten() {
            Some(bytes) => bytes,
            None => kernels.paged_attn_workspace(&self.attention(grid)),
        }
    }

    /// Numbers of a step's attention; its pointers are null.
    fn attention(&self, grid: Grid) -> kvwarp::ffi::kvw_paged_attn_params {
        params!(kvw_paged_attn_params {
            q_heads: self.net.config.heads as i32,
            cache: self.cache.view(0, grid.rows, [self.control.at(0), 0]),
            q_len: grid.each as i32,
            max_slabs: self.cache.table_slabs() as i32,
            sliding_window: self.sliding_window(),
            dtype: KVW_F16,
        })
    }

    /// 0 where a token sees all before it.
    pub(super) fn sliding_window(&self) -> i32 {
        self.net.config.sliding_window.unwrap_or(0) as i32
    }

    fn choose(&self, places: &Places, first: usize, rows: usize) -> Result<()> {
        let of = |place: usize| self.control.at(place + first);
        let history = self.control.history() + (first * kvwarp::sample::MAX_RECENT * 4) as u64;
        let params = params!(kvw_sample_params {
            seqs: rows as i32,
            logits: at(self.net.work.logits.at()),
            tokens: at(self.chosen.at() + 4 * first as u64),
            seeds: at(self.control.at(places.seeds + 2 * first)),
            steps: at(of(places.draws)),
            temperature: at(of(places.temperature)),
            top_p: at(of(places.top_p)),
            min_p: at(of(places.min_p)),
            top_k: at(of(places.top_k)),
            history: at(history),
            history_lens: at(of(places.history_lens)),
            penalty: at(of(places.penalty)),
            vocab: self.net.config.vocab as i32,
            history_stride: kvwarp::sample::MAX_RECENT as i32,
        });
        self.net.ops.run(|k| &k.sample, &params)
    }
}
