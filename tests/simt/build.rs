//! Compiles the executor and the kernels. Objects are kept by the hash of what they are made of, libraries by
//! the hash of everything, so a test run compiles only what changed.
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, io, thread};

mod ptx;

/// As nvcc's device code: no contraction that the source does not ask for, type punning allowed.
/// No unique symbols: the two libraries must not share their state.
const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fno-semantic-interposition",
    "-Wno-unknown-pragmas",
    "-Werror=return-type",
    #[cfg(target_arch = "x86_64")]
    "-mf16c",
];

/// Kernels of both builds: a variable that was not set holds 0xfe bytes, not what happens to lie there.
const KERNEL: &str = "-ftrivial-auto-var-init=pattern";

/// Kernels of the checked build: the sanitizers' calls land in csrc/simt/check_hooks.cpp, their own libraries
/// are not linked.
const CHECKS: &[&str] =
    &["-fsanitize=thread,alignment,bounds,shift-exponent", "--param=tsan-distinguish-volatile=1"];

struct Source {
    path: PathBuf,
    text: Vec<u8>,
}

impl Source {
    fn is(&self, extensions: &[&str]) -> bool {
        extensions.iter().any(|e| self.path.extension() == Some(OsStr::new(e)))
    }
    fn in_executor(&self) -> bool {
        self.path.parent().is_some_and(|p| p.ends_with("simt"))
    }
    fn only_checked(&self) -> bool {
        self.path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("check"))
    }
}

struct Job<'a> {
    source: &'a Source,
    object: PathBuf,
    flags: Vec<&'static str>,
}

fn hash(flags: &[&str], texts: &[&Source]) -> String {
    let mut h = DefaultHasher::new();
    compiler().hash(&mut h);
    flags.hash(&mut h);
    for s in texts {
        s.path.hash(&mut h);
        s.text.hash(&mut h);
    }
    format!("{:016x}", h.finish())
}

fn compiler() -> String {
    env::var("CXX").unwrap_or_else(|_| "g++".into())
}

fn read_sources(dir: &Path, out: &mut Vec<Source>) -> io::Result<()> {
    let mut entries =
        fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            read_sources(&path, out)?;
        } else {
            out.push(Source { text: fs::read(&path)?, path });
        }
    }
    Ok(())
}

/// `target/simt/<hash>/<kind>.so`, built if it is not there; `kind` is plain or checked. With `KVW_BUNDLE`, a
/// folder, the library lies there, or is copied there once built: its tests need no compiler.
pub fn library(kind: &str) -> Result<PathBuf, String> {
    let Some(bundle) = env::var_os("KVW_BUNDLE") else { return built(kind) };
    let so = Path::new(&bundle).join(kind).with_extension("so");
    if !so.exists() {
        fs::copy(built(kind)?, &so).map_err(|e| format!("{}: {e}", so.display()))?;
    }
    Ok(so)
}

/// `csrc`, beside the crate that tests are of or beside the folder that this crate is in; one path either way, as
/// objects are kept by it.
fn root() -> io::Result<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.join("csrc").canonicalize().or_else(|_| package.join("../csrc").canonicalize())
}

fn built(kind: &str) -> Result<PathBuf, String> {
    let root = root().map_err(|e| format!("csrc: {e}"))?;
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("simt");
    let mut sources = Vec::new();
    for dir in [&root, &root.with_file_name("ptx")] {
        read_sources(dir, &mut sources).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    sources.retain(|s| s.is(&["cu", "cuh", "cpp", "h", "map", "ptx"]));
    translate(&mut sources)?;
    let flags = [FLAGS, &[KERNEL], CHECKS].concat();
    let dir = target.join(hash(&flags, &sources.iter().collect::<Vec<_>>()));
    let so = dir.join(kind).with_extension("so");
    if so.exists() {
        return Ok(so);
    }
    build(&root, &target, &so, &sources, kind == "checked").map_err(|e| match e {
        Failure::Io(e) => format!("building {}: {e}", so.display()),
        Failure::Compiler(text) => text,
    })?;
    Ok(so)
}

/// Kernels in PTX become C++, which `csrc` includes as `<name>.ptx.h`.
fn translate(sources: &mut [Source]) -> Result<(), String> {
    for source in sources.iter_mut().filter(|s| s.is(&["ptx"])) {
        let name = source.path.file_name().unwrap_or_default().to_string_lossy();
        let text = String::from_utf8_lossy(&source.text);
        source.text = ptx::to_cpp(&format!("ptx/{name}"), &text)?.into_bytes();
    }
    Ok(())
}

enum Failure {
    Io(io::Error),
    Compiler(String),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

fn build(
    root: &Path,
    target: &Path,
    so: &Path,
    sources: &[Source],
    checked: bool,
) -> Result<(), Failure> {
    let objects = target.join("objects");
    fs::create_dir_all(&objects)?;
    fs::create_dir_all(so.parent().unwrap_or(target))?;
    let lock = File::create(target.join("lock"))?;
    lock.lock()?; // released when dropped; another process may have built it meanwhile
    if so.exists() {
        return Ok(());
    }
    let jobs = plan(&objects, sources, checked);
    let bodies = target.join("ptx");
    fs::create_dir_all(&bodies)?;
    for source in sources.iter().filter(|s| s.is(&["ptx"])) {
        let name = source.path.with_extension("ptx.h");
        fs::write(bodies.join(name.file_name().unwrap_or_default()), &source.text)?;
    }
    compile_all([root, &root.join("simt"), &bodies], &jobs)?;
    let part = so.with_extension("part");
    let mut link = Command::new(compiler());
    link.args(["-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", "-o"]).arg(&part);
    link.arg(format!("-Wl,--version-script={}", root.join("simt/exports.map").display()));
    run(link.args(jobs.iter().map(|j| &j.object)).args(["-lm", "-lpthread"]))?;
    Ok(fs::rename(part, so)?)
}

/// What to compile: the executor once for both kinds, the kernels once for each.
fn plan<'a>(objects: &Path, sources: &'a [Source], checked: bool) -> Vec<Job<'a>> {
    let headers: Vec<&Source> = sources.iter().filter(|s| s.is(&["h", "cuh", "ptx"])).collect();
    let wanted = sources
        .iter()
        .filter(|s| s.is(&["cu"]) || (s.is(&["cpp"]) && (checked || !s.only_checked())));
    wanted
        .map(|source| {
            let kernel = source.is(&["cu"]);
            let flags = match (kernel, checked) {
                (false, _) => FLAGS.to_vec(),
                (true, false) => [FLAGS, &[KERNEL]].concat(),
                (true, true) => [FLAGS, &[KERNEL], CHECKS].concat(),
            };
            let mut parts = vec![source];
            parts.extend(
                headers.iter().filter(|h| kernel || h.in_executor() || h.path.ends_with("types.h")),
            );
            let object = objects.join(hash(&flags, &parts)).with_extension("o");
            Job { source, object, flags }
        })
        .collect()
}

fn compile_all(include: [&Path; 3], jobs: &[Job]) -> Result<(), Failure> {
    let queue = Mutex::new(jobs.iter().filter(|j| !j.object.exists()));
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    let next = || queue.lock().ok()?.next();
    let work = || {
        while let Some(job) = next() {
            compile(include, job)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let panicked = || Failure::Compiler("a compile thread panicked".into());
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(panicked())))
    })
}

fn compile(include: [&Path; 3], job: &Job) -> Result<(), Failure> {
    let part = job.object.with_extension("part");
    let mut c = Command::new(compiler());
    c.args(&job.flags);
    for folder in include {
        c.arg("-I").arg(folder);
    }
    run(c.args(["-x", "c++", "-c"]).arg(&job.source.path).arg("-o").arg(&part))?;
    Ok(fs::rename(part, &job.object)?)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(Failure::Compiler(format!("{command:?}\n{}", String::from_utf8_lossy(&out.stderr))))
}
