//! What a converted model keeps in place of keys and values (EliteKV, arXiv:2503.01586): `2 r kv_heads + c` elements of a
//! token and layer, in slabs of [`kvwarp::lowrank_kv`].
//!
//! A slot is 64 tokens in every layer, so a sequence has one page table. Slabs that have left the window count against the
//! limits as those of other stores do; newer ones stand for their rings, beside the limit. All are written as f16, and those
//! that have left the window are packed between steps, when layers hold the same tokens: nothing is ever dropped.

mod pools;

use std::ops::Range;

use kvwarp::Error;
use kvwarp::lowrank_kv::View;
use kvwarp::pages::{Entry, packed_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

use super::head::Rules;
use super::{Cache, CacheError, Sequence, open_mut};
use crate::runner::{Frozen, Held, Row};
pub use pools::{Latents, beside, in_window, newest, stride};
use pools::{Layer, slot};

impl Cache {
    /// Writes `n` tokens of `layer` of `row` after those that it holds: `z` `[n, c]` and `k` `[n, kv_heads, 2 r]`, rotated.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when the pools are full.
    pub fn put(
        &mut self,
        row: Row,
        layer: usize,
        (z, k): (&[f32], &[f32]),
        n: usize,
    ) -> Result<(), CacheError> {
        let range = self.range(layer);
        let Some(latents) = &mut self.latents else { return Ok(()) };
        let Sequence { heads, table, .. } = open_mut(&mut self.sequences, row);
        let first = heads[range.start].len;
        while table.len() < (first + n).div_ceil(TOKENS) {
            table.push(latents.take(Format::F16)?);
        }
        let Layer { shape, exact, .. } = &mut latents.layers[layer];
        let rows = z.chunks_exact(z.len() / n).zip(k.chunks_exact(k.len() / n));
        for (token, (z, k)) in (first..first + n).zip(rows) {
            shape.write(exact.slab_mut(slot(table[token / TOKENS])), token % TOKENS, z, k)?;
        }
        heads[range].iter_mut().for_each(|head| head.len += n);
        Ok(())
    }

    /// Packs what has left the window of `row`: between steps.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn pack_latents(&mut self, row: Row, team: &Team) -> Result<(), CacheError> {
        let Some(latents) = &mut self.latents else { return Ok(()) };
        let rules = Rules::new(&self.spec, None);
        let Sequence { table, packed, position, .. } = open_mut(&mut self.sequences, row);
        while *packed < packed_slabs(*position, rules.window) {
            if rules.format(*packed) != Format::F16 {
                table[*packed] = latents.pack(table[*packed], rules.rounding.range, team)?;
            }
            *packed += 1;
        }
        Ok(())
    }

    /// What the tokens `range` of `layer` of `row` are: `z` `[n, c]`, then `k` `[n, kv_heads, 2 r]`.
    ///
    /// # Errors
    /// Those of [`kvwarp::lowrank_kv::Shape::unpack`].
    pub fn rows(
        &self,
        row: Row,
        layer: usize,
        range: Range<usize>,
    ) -> Result<[Vec<f32>; 2], CacheError> {
        let [mut z, mut k] = [Vec::new(), Vec::new()];
        let Some(layer) = self.latents.as_ref().map(|latents| &latents.layers[layer]) else {
            return Ok([z, k]);
        };
        let (table, mut room) = (&self.sequence(row).table, vec![0; layer.shape.slab_bytes()]);
        let (first, last) = (range.start / TOKENS, range.end.div_ceil(TOKENS));
        for (index, entry) in table.iter().enumerate().take(last).skip(first) {
            let Some(at) = entry.get() else { continue };
            let slab = layer.exact(at, &mut room)?;
            for token in range.start.max(index * TOKENS)..range.end.min((index + 1) * TOKENS) {
                let row = layer.shape.read((Format::F16, slab), token % TOKENS);
                let (of_z, of_k) = row.split_at(layer.shape.rank());
                z.extend_from_slice(of_z);
                k.extend_from_slice(of_k);
            }
        }
        Ok([z, k])
    }

    /// What attention over `layer` of `row` reads, where there are latents: the tokens before the newest `later`.
    pub fn latent(&self, row: Row, layer: usize, later: usize) -> Option<View<'_>> {
        let latents = self.latents.as_ref()?;
        let Layer { shape, exact, packed } = &latents.layers[layer];
        let Sequence { heads, table, .. } = self.sequence(row);
        let len = heads[self.range(layer).start].len - later;
        let packed = self.spec.packs().map(|store| (store, packed));
        Some(View { shape: *shape, pool: exact, packed, table, len })
    }

    /// F16 slots of open sequences that are in their windows.
    pub(super) fn newest(&self) -> usize {
        let newest = |s: &Sequence| s.table.len() - s.packed;
        self.sequences.iter().flatten().map(newest).sum()
    }

    /// [`Cache::freeze`] of latents: what has left the window by reference, the rest copied.
    pub(super) fn freeze_latents(&mut self, row: Row) -> Result<Frozen, CacheError> {
        let (len, packed) = (self.position(row), self.sequence(row).packed);
        let table = self.sequence(row).table[..len.div_ceil(TOKENS)].to_vec();
        let entries = self.table_again(table, [len, packed])?;
        let heads = vec![Held { len, packed, chosen: 0 }];
        Ok(Frozen { len, heads, entries })
    }

    /// [`Cache::thaw`] of latents into an empty sequence.
    pub(super) fn thaw_latents(&mut self, row: Row, frozen: &Frozen) {
        let (len, packed) = (frozen.len, frozen.heads[0].packed);
        let table = self.table_again(frozen.entries.clone(), [len, packed]);
        let table = table.expect("an open sequence has its window beside the limit");
        let sequence = self.sequence_mut(row);
        sequence.heads.iter_mut().for_each(|head| head.len = len);
        (sequence.table, sequence.packed, sequence.position) = (table, packed, len);
    }

    /// Another table of the same `len` tokens, of which `packed` slabs have left the window.
    fn table_again(
        &mut self,
        table: Vec<Entry>,
        [len, packed]: [usize; 2],
    ) -> Result<Vec<Entry>, Error> {
        let Some(latents) = &mut self.latents else { return Ok(table) };
        let (shared, rest) = table.split_at(packed);
        let tokens = |i: usize| TOKENS.min(len - (packed + i) * TOKENS);
        let copies = rest.iter().enumerate();
        let copies = copies
            .map(|(i, &entry)| latents.adopt(Format::F16, &latents.read(entry, tokens(i))))
            .collect::<Result<Vec<_>, _>>()?;
        shared.iter().for_each(|&entry| latents.share(entry));
        Ok([shared, &copies].concat())
    }
}
