//! A runner without a model: what it holds is a hash of all that it was given and how, so that whatever a scheduler does
//! differently shows in the tokens; and slabs of one head, counted as a cache counts them.

use std::collections::HashMap;

use kvwarp::pages::{Entry, Slots, packed_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp_engine::cache::CacheStats;
use kvwarp_engine::config::Config;
use kvwarp_engine::runner::{Frozen, Row, RunError, Runner, Slabs, TURN, Turn, check};
use kvwarp_engine::spec::CacheSpec;
use kvwarp_engine::watch::Watch;

/// Reading it fails.
pub const UNREADABLE: u32 = 250;
/// A step with it fails for all.
pub const EXPLOSIVE: u32 = 251;
/// Tokens that are chosen are below.
pub const VOCAB: u64 = 250;

const WINDOW: usize = 64;

#[derive(Clone, Default)]
struct Held {
    len: usize,
    state: u64,
    /// `state` before each token of the last step.
    past: Vec<u64>,
    table: Vec<Entry>,
    /// A call with it failed: it can only be closed.
    broken: bool,
}

pub struct Fake {
    config: Config,
    spec: CacheSpec,
    rows: usize,
    slots: [Slots; Format::ALL.len()],
    held: Vec<Option<Held>>,
    frozen: HashMap<Vec<Entry>, u64>,
}

pub fn mix(a: u64, b: u64) -> u64 {
    kvwarp::sample::draw(a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15), 0)
}

impl Fake {
    /// `rows` sequences of up to 512 tokens, `slabs` of f16 and of q4.
    pub fn new(rows: usize, slabs: [usize; 2]) -> Self {
        let folder = super::program::fixture("llama3");
        let text = std::fs::read_to_string(format!("{folder}/config.json")).unwrap();
        let mut slots = Format::ALL.map(|_| Slots::new(0));
        slots[Format::F16 as usize].set_limit(slabs[0]);
        slots[Format::Q4 as usize].set_limit(slabs[1]);
        let (config, spec) = (Config::from_json(&text).unwrap(), "q4,window=64".parse().unwrap());
        Self { config, spec, rows, slots, held: Vec::new(), frozen: HashMap::new() }
    }

    pub fn used(&self) -> usize {
        self.slots.iter().map(Slots::used).sum()
    }

    fn insert(&mut self, held: Held) -> Result<Row, RunError> {
        if self.held.iter().flatten().count() == self.rows {
            return Err(RunError::Rows { rows: self.rows });
        }
        self.held.push(Some(held));
        Ok(Row(self.held.len() - 1))
    }

    fn row(&mut self, row: Row) -> &mut Held {
        let held = self.held[row.0].as_mut().expect("an open row");
        assert!(!held.broken, "a row that failed was used");
        held
    }

    fn take(&mut self, format: Format) -> Entry {
        let slot = self.slots[format as usize].take().expect("room was made");
        assert_eq!(self.slots[format as usize].owners(slot), 1, "a writable slab has one owner");
        Entry::new(format, slot)
    }

    /// Appends a token; slabs that leave the window are packed.
    fn append(&mut self, row: Row, token: u32) {
        let held = self.row(row);
        held.len += 1;
        held.state = mix(held.state, u64::from(token));
        while held_table(&self.held, row) < packed_slabs(self.len(row), WINDOW) {
            let sink = held_table(&self.held, row) == 0;
            let entry = self.take(if sink { Format::F16 } else { Format::Q4 });
            self.row(row).table.push(entry);
        }
    }

    fn give(&mut self, entries: &[Entry]) {
        for (format, slot) in entries.iter().filter_map(|entry| entry.get()) {
            self.slots[format as usize].give(slot as u32);
        }
    }

    fn failure(&mut self, rows: &[Row]) -> RunError {
        rows.iter().for_each(|&row| self.row(row).broken = true);
        kvwarp::Error::TooBig { op: "fake", size: 0 }.into()
    }
}

fn held_table(held: &[Option<Held>], row: Row) -> usize {
    held[row.0].as_ref().map_or(0, |held| held.table.len())
}

impl Runner for Fake {
    fn config(&self) -> &Config {
        &self.config
    }

    fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn context(&self) -> usize {
        512
    }

    fn open(&mut self) -> Result<Row, RunError> {
        self.insert(Held::default())
    }

    fn close(&mut self, row: Row) {
        let held = self.held[row.0].take().expect("an open row");
        self.give(&held.table);
    }

    fn len(&self, row: Row) -> usize {
        self.held[row.0].as_ref().expect("an open row").len
    }

    fn free(&self) -> Slabs {
        self.slots.each_ref().map(Slots::available)
    }

    fn need(&self, len: usize, n: usize) -> Slabs {
        let (before, after) = (packed_slabs(len, WINDOW), packed_slabs(len + n, WINDOW));
        let mut need = Slabs::default();
        need[Format::F16 as usize] = after.min(1) - before.min(1);
        need[Format::Q4 as usize] = after.saturating_sub(1) - before.saturating_sub(1);
        need
    }

    fn read(&mut self, row: Row, tokens: &[u32], _: &mut Watch<'_>) -> Result<(), RunError> {
        assert!(!tokens.is_empty());
        check(&self.need(self.len(row), tokens.len()), &self.free())?;
        if tokens.contains(&UNREADABLE) {
            return Err(self.failure(&[row]));
        }
        // Where a prompt was cut is part of what is held.
        let held = self.row(row);
        held.state = mix(held.state, !(tokens.len() as u64));
        tokens.iter().for_each(|&token| self.append(row, token));
        Ok(())
    }

    fn step(&mut self, turns: &[Turn<'_>], out: &mut Vec<Vec<u32>>) -> Result<(), RunError> {
        let mut rows: Vec<_> = turns.iter().map(|turn| turn.row).collect();
        for turn in turns {
            assert!((1..=1 + self.drafts(turn.row)).contains(&turn.tokens.len()));
            check(&self.need(self.len(turn.row), turn.tokens.len()), &self.free())?;
        }
        if turns.iter().any(|turn| turn.tokens.contains(&EXPLOSIVE)) {
            return Err(self.failure(&rows));
        }
        out.clear();
        for turn in turns {
            let mut recent = turn.recent.iter().fold(0, |sum, &token| mix(sum, u64::from(token)));
            let mut chosen = Vec::new();
            self.row(turn.row).past.clear();
            for (i, &token) in turn.tokens.iter().enumerate() {
                let before = self.row(turn.row).state;
                self.row(turn.row).past.push(before);
                self.append(turn.row, token);
                if i > 0 {
                    recent = mix(recent, u64::from(token));
                }
                let draw = mix(turn.choice.seed, (turn.draw + i as i32) as u64);
                chosen.push((mix(mix(self.row(turn.row).state, draw), recent) % VOCAB) as u32);
            }
            out.push(chosen);
        }
        rows.sort();
        rows.dedup();
        assert_eq!(rows.len(), turns.len(), "one turn a row");
        Ok(())
    }

    fn rollback(&mut self, row: Row, n: usize) -> Result<(), RunError> {
        let held = self.row(row);
        for _ in 0..n {
            held.state = held.past.pop().expect("a token of the last step");
            held.len -= 1;
        }
        assert!(held.table.len() <= packed_slabs(held.len, WINDOW), "a slab was packed for drafts");
        Ok(())
    }

    fn drafts(&self, row: Row) -> usize {
        let len = self.len(row) + 1;
        let loose = |n: &usize| packed_slabs(len + n, WINDOW) == packed_slabs(len, WINDOW);
        (1..TURN).take_while(loose).count().min(self.context().saturating_sub(len))
    }

    fn freeze(&mut self, row: Row) -> Result<Frozen, RunError> {
        let Held { len, state, table, .. } = self.row(row).clone();
        let ring = len.div_ceil(TOKENS) - table.len();
        let mut need = Slabs::default();
        need[Format::F16 as usize] = ring;
        check(&need, &self.free())?;
        for (format, slot) in table.iter().filter_map(|entry| entry.get()) {
            self.slots[format as usize].share(slot as u32);
        }
        let mut entries = table;
        (0..ring).for_each(|_| entries.push(self.take(Format::F16)));
        self.frozen.insert(entries.clone(), state);
        Ok(Frozen { len, heads: Vec::new(), entries })
    }

    fn thaw(&mut self, frozen: &Frozen) -> Result<Row, RunError> {
        let state = self.frozen[&frozen.entries];
        let table = frozen.entries[..packed_slabs(frozen.len, WINDOW)].to_vec();
        let row = self.insert(Held {
            past: Vec::new(),
            len: frozen.len,
            state,
            table: table.clone(),
            broken: false,
        })?;
        for (format, slot) in table.iter().filter_map(|entry| entry.get()) {
            self.slots[format as usize].share(slot as u32);
        }
        Ok(row)
    }

    fn melt(&mut self, frozen: Frozen) {
        self.frozen.remove(&frozen.entries).expect("frozen");
        self.give(&frozen.entries);
    }

    fn stats(&self, row: Row) -> CacheStats {
        let tokens = self.len(row);
        let (used_bytes, peak_bytes, capacity_bytes) = (0, 0, 0);
        CacheStats { tokens, used_bytes, peak_bytes, capacity_bytes, effective_bits: 0.0 }
    }
}
