//! The file of answers: a line each, whole or not at all, so that a run goes on where it was interrupted.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli::Usage;

/// What answers depend on: the hash of each part, by name.
pub struct Run(pub [(&'static str, String); 3]);

impl Run {
    /// Eight digits of each part.
    fn id(&self) -> String {
        self.0.each_ref().map(|(_, hash)| &hash[..8]).join("-")
    }

    /// How another run's id differs.
    fn difference(&self, id: &str) -> Option<String> {
        let other: Vec<_> = id.split('-').collect();
        let parts = self.0.iter().enumerate();
        let differs = |(i, (_, hash)): &(usize, &(_, String))| other.get(*i) != Some(&&hash[..8]);
        let names: Vec<_> = parts.filter(differs).map(|(_, (name, _))| *name).collect();
        (!names.is_empty()).then(|| names.join(" and "))
    }
}

/// SHA-256 in hexadecimal.
pub fn hash(bytes: impl AsRef<[u8]>) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// An open file of answers.
pub struct Answers {
    file: File,
    run: String,
    /// Ids that have one, as JSON.
    answered: HashSet<String>,
}

impl Answers {
    /// Opens `path` to go on with it, or begins it. A last line that is not whole is cut off.
    pub fn open(path: &Path, run: &Run) -> anyhow::Result<Self> {
        let name = || path.display().to_string();
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).with_context(name)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(name)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut answered = HashSet::new();
        for (i, line) in bytes[..whole].split_inclusive(|&byte| byte == b'\n').enumerate() {
            let line: Value = serde_json::from_slice(line).unwrap_or_default();
            let (Some(id), Some(of)) = (line.get("id"), line.get("run").and_then(Value::as_str))
            else {
                bail!("{}, line {}: no answer of `kvwarp batch`", name(), i + 1);
            };
            if let Some(other) = run.difference(of) {
                let problem = format!("{} is of a run with other {other}", name());
                return Err(Usage(format!("{problem}: remove it, or name another --out")).into());
            }
            answered.insert(id.to_string());
        }
        file.set_len(whole as u64).with_context(name)?;
        file.seek(SeekFrom::Start(whole as u64)).with_context(name)?;
        Ok(Self { file, run: run.id(), answered })
    }

    /// Whether this id has an answer.
    pub fn has(&self, id: &Value) -> bool {
        self.answered.contains(&id.to_string())
    }

    /// Writes the answer of `id`, a line in one piece.
    pub fn put(&mut self, id: &Value, mut answer: Value) -> std::io::Result<()> {
        answer["id"] = id.clone();
        answer["run"] = json!(self.run);
        self.file.write_all(format!("{answer}\n").as_bytes())?;
        self.file.flush()
    }
}
