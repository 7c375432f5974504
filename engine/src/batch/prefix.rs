//! Beginnings of prompts that have been read, kept for others that begin alike.
//!
//! A block's key is the SHA-256 of the key of what comes before it and of its tokens, so equal keys mean equal tokens from
//! the first on, and with them equal slabs: a prompt is read in blocks at fixed multiples of their length.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;

use kvwarp::pages::Entry;
use sha2::{Digest, Sha256};

use crate::runner::{Frozen, Slabs};

/// Hash of a beginning.
pub type Key = [u8; 32];

/// Frozen sequences by the tokens that they hold.
pub struct Prefixes {
    root: Key,
    block: usize,
    kept: HashMap<Key, Kept>,
    clock: u64,
    /// How many of the kept refer to each slab.
    users: HashMap<Entry, usize>,
    /// Slabs in `users`.
    slabs: Slabs,
}

struct Kept {
    frozen: Frozen,
    /// When it was last of use.
    used: u64,
}

impl Prefixes {
    /// None yet, of blocks of `block` tokens; keys begin at `root`.
    pub fn new(root: Key, block: usize) -> Self {
        let (kept, users) = (HashMap::new(), HashMap::new());
        Self { root, block, kept, clock: 0, users, slabs: Slabs::default() }
    }

    /// The key at the end of each whole block of `tokens`.
    pub fn keys(&self, tokens: &[u32]) -> Vec<Key> {
        let next = |before: &mut Key, block: &[u32]| {
            let mut hash = Sha256::new();
            hash.update(*before);
            block.iter().for_each(|token| hash.update(token.to_le_bytes()));
            *before = hash.finalize().into();
            Some(*before)
        };
        tokens.chunks_exact(self.block).scan(self.root, next).collect()
    }

    /// The longest kept of these beginnings of one prompt, shortest first. All of them count as used, the shorter the
    /// later, so that a beginning outlasts what follows it.
    pub fn longest(&mut self, keys: &[Key]) -> Option<&Frozen> {
        for key in keys.iter().rev() {
            if let Some(kept) = self.kept.get_mut(key) {
                self.clock += 1;
                kept.used = self.clock;
            }
        }
        let key = keys.iter().rev().find(|key| self.kept.contains_key(*key))?;
        self.kept.get(key).map(|kept| &kept.frozen)
    }

    /// Tokens of the longest kept of these beginnings; 0 when there is none.
    pub fn reach(&self, keys: &[Key]) -> usize {
        let longest = keys.iter().rev().find_map(|key| self.kept.get(key));
        longest.map_or(0, |kept| kept.frozen.len)
    }

    /// Whether this beginning is kept.
    pub fn contains(&self, key: &Key) -> bool {
        self.kept.contains_key(key)
    }

    /// Keeps a beginning; what was kept of the same key, if anything, comes back.
    #[must_use]
    pub fn insert(&mut self, key: Key, frozen: Frozen) -> Option<Frozen> {
        let old = self.remove(&key);
        for &entry in &frozen.entries {
            let users = self.users.entry(entry).or_default();
            *users += 1;
            self.slabs[tag(entry)] += usize::from(*users == 1);
        }
        self.clock += 1;
        self.kept.insert(key, Kept { frozen, used: self.clock });
        old
    }

    /// Forgets the least recently used.
    pub fn forget(&mut self) -> Option<Frozen> {
        let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key)?;
        self.remove(&oldest)
    }

    /// Slabs that are kept: more could not be had by forgetting everything.
    pub fn slabs(&self) -> Slabs {
        self.slabs
    }

    fn remove(&mut self, key: &Key) -> Option<Frozen> {
        let frozen = self.kept.remove(key)?.frozen;
        for &entry in &frozen.entries {
            let MapEntry::Occupied(mut users) = self.users.entry(entry) else { continue };
            *users.get_mut() -= 1;
            if *users.get() == 0 {
                users.remove();
                self.slabs[tag(entry)] -= 1;
            }
        }
        Some(frozen)
    }
}

/// The format of a slab, as a place in [`Slabs`].
fn tag(entry: Entry) -> usize {
    entry.get().map_or(0, |(format, _)| format as usize)
}
