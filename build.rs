//! Compiles `csrc/*.cu` into one static library with nvcc, where there is an nvcc.
//!
//! | variable | meaning |
//! |---|---|
//! | `KVW_NVCC`, `CUDA_HOME` | nvcc, or the toolkit that holds it; else `target/cuda` (made by `tests/run`), PATH, /usr/local/cuda |
//! | `KVW_ARCHS` | architectures, default `80;89;90a;80-virtual`; `-virtual` embeds PTX |
//! | `KVW_REQUIRE_CUDA` | no nvcc is an error, not a build with CPU paths only |
//! | `KVW_SKIP_NVCC` | build with CPU paths only, even where there is an nvcc |
//! | `KVW_BLESS` | with feature `bindgen`: rewrite `src/ffi.rs` |

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

const DEFAULT_ARCHS: &str = "80;89;90a;80-virtual";
#[rustfmt::skip]
const VARIABLES: [&str; 7] =
    ["KVW_NVCC", "CUDA_HOME", "KVW_ARCHS", "KVW_REQUIRE_CUDA", "KVW_SKIP_NVCC", "KVW_BLESS", "DOCS_RS"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kvw_cuda)");
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-changed=ptx");
    println!("cargo::rerun-if-changed=build.rs");
    VARIABLES.iter().for_each(|v| println!("cargo::rerun-if-env-changed={v}"));
    #[cfg(feature = "bindgen")]
    bindings();
    let skip = ["KVW_SKIP_NVCC", "DOCS_RS"].iter().any(|v| env::var_os(v).is_some());
    if env::var_os("CARGO_FEATURE_CUDA").is_none() || skip {
        return;
    }
    match Toolkit::find() {
        Some(toolkit) => kernels(&toolkit),
        None if env::var_os("KVW_REQUIRE_CUDA").is_some() => {
            fail("no nvcc of CUDA 13 or later: set KVW_NVCC or CUDA_HOME, or run tests/run once")
        }
        None => {
            println!("cargo::warning=no nvcc of CUDA 13 or later: building with CPU paths only")
        }
    }
}

/// Objects are kept under a hash of command and of what it reads, so that profiles and features share them.
fn kernels(toolkit: &Toolkit) {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let cache = target_dir(&out).join("kernels");
    let bodies = cache.join("ptx");
    fs::create_dir_all(&bodies).unwrap();
    files(Path::new("ptx"), "ptx").iter().for_each(|source| quote(source, &bodies));
    let archs = env::var("KVW_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.into());
    let sources = files(Path::new("csrc"), "cu");
    let version = hash(toolkit.version.as_bytes(), 0);
    let job = |source: &PathBuf| {
        let mut nvcc = Command::new(&toolkit.nvcc);
        nvcc.args(["-c", "-std=c++17", "-O3", "-lineinfo", "-Icsrc", "-Xptxas=-v,-warn-spills"])
            .arg("--compress-mode=size") // a third of the bytes; drivers since R550 read it
            .arg("-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-Wall,-Wextra")
            .args(archs.split(';').map(gencode))
            .arg(source);
        let read =
            included(source).iter().fold(version, |h, path| hash(&fs::read(path).unwrap(), h));
        let key = hash(format!("{nvcc:?}").as_bytes(), read);
        let stem = source.file_stem().unwrap().to_string_lossy();
        nvcc.arg("-I").arg(&bodies); // after the hash: it says nothing about what is in there
        (nvcc, cache.join(format!("{stem}-{key:016x}.o")))
    };
    let jobs: Vec<_> = sources.iter().map(job).collect();
    let objects: Vec<_> = jobs.iter().map(|(_, object)| object.clone()).collect();
    compile_all(jobs.into_iter().filter(|(_, object)| !object.exists()).collect());

    let library = out.join("libkvwarp.a");
    let _ = fs::remove_file(&library);
    run(Command::new("ar").arg("crs").arg(&library).args(&objects));
    println!("cargo::rustc-cfg=kvw_cuda");
    println!("cargo::rustc-env=KVW_BUILT_ARCHS={archs}");
    println!("cargo::rustc-env=KVW_KERNELS={}", library.display());
    println!("cargo::rustc-env=KVW_CUDART={}", toolkit.libraries.display());
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-search=native={}", toolkit.libraries.display());
    // After the kernels: their launch stubs need libstdc++'s guards, cudart_static the rest.
    for library in ["static=kvwarp", "static=cudart_static", "stdc++", "dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={library}");
    }
}

/// Two compilers at a time; each keeps ptxas's report beside its object.
fn compile_all(pending: Vec<(Command, PathBuf)>) {
    let queue = std::sync::Mutex::new(pending);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((mut nvcc, object)) = { queue.lock().unwrap().pop() } {
                    let partial = object.with_extension("partial");
                    let report = run(nvcc.arg("-o").arg(&partial));
                    fs::write(object.with_extension("ptxas"), report).unwrap();
                    fs::rename(partial, &object).unwrap();
                }
            });
        }
    });
}

fn gencode(arch: &str) -> String {
    match arch.strip_suffix("-virtual") {
        Some(arch) => format!("-gencode=arch=compute_{arch},code=compute_{arch}"),
        None => format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
    }
}

struct Toolkit {
    nvcc: PathBuf,
    libraries: PathBuf,
    version: String,
}

impl Toolkit {
    fn find() -> Option<Self> {
        let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
        let mut candidates: Vec<PathBuf> =
            env::var_os("KVW_NVCC").map(Into::into).into_iter().collect();
        candidates.extend(env::var_os("CUDA_HOME").map(|h| Path::new(&h).join("bin/nvcc")));
        candidates.push(target_dir(&out).join("cuda/nvidia/cu13/bin/nvcc"));
        let path = env::var_os("PATH").unwrap_or_default();
        candidates.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
        candidates.push("/usr/local/cuda/bin/nvcc".into());
        candidates.into_iter().find_map(Self::at)
    }

    /// The toolkit of this nvcc, if it is CUDA 13 or later and holds the static runtime.
    fn at(nvcc: PathBuf) -> Option<Self> {
        let nvcc = fs::canonicalize(nvcc).ok()?;
        let root = nvcc.parent()?.parent()?;
        let libraries = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"]
            .map(|d| root.join(d))
            .into_iter()
            .find(|d| d.join("libcudart_static.a").is_file())?;
        let text = Command::new(&nvcc).arg("--version").output().ok()?.stdout;
        let version = String::from_utf8(text).ok()?;
        let major = version.split("release ").nth(1)?.split('.').next()?.parse::<u32>().ok()?;
        (major >= 13).then_some(Self { nvcc, libraries, version })
    }
}

/// `target`, or wherever cargo builds: OUT_DIR is TARGET/PROFILE/build/PACKAGE/out.
fn target_dir(out: &Path) -> PathBuf {
    out.ancestors().nth(4).unwrap_or(out).to_owned()
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut all: Vec<_> =
        entries.filter(|p| p.extension().is_some_and(|x| x == extension)).collect();
    all.sort();
    all
}

/// The body of the kernel in a file of `ptx` as strings for an `asm` statement.
fn quote(source: &Path, to: &Path) {
    let text = fs::read_to_string(source).unwrap();
    let body = text.lines().skip_while(|line| *line != "{").take_while(|line| *line != "}");
    let line = |line: &str| {
        let code = line.split("//").next().unwrap_or("").trim();
        (!code.is_empty()).then(|| format!("\"{code}\\n\"\n"))
    };
    let quoted: String = body.filter_map(line).chain(["\"}\\n\"\n".to_owned()]).collect();
    let name = source.with_extension("ptx.h");
    fs::write(to.join(name.file_name().unwrap()), quoted).unwrap();
}

/// A source and all that it includes in quotes, from the includer's folder or `csrc`, each once; kernels of `ptx` that it
/// includes as `<name>.ptx.h`.
fn included(source: &Path) -> Vec<PathBuf> {
    let mut found = vec![fs::canonicalize(source).unwrap()];
    let mut at = 0;
    while at < found.len() {
        let text = fs::read_to_string(&found[at]).unwrap();
        let beside = found[at].parent().unwrap().to_owned();
        for line in text.lines() {
            let Some(rest) = line.strip_prefix("#include \"") else { continue };
            let name = rest.split('"').next().unwrap_or(rest);
            let name =
                name.strip_suffix(".ptx.h").map_or(name.into(), |stem| format!("{stem}.ptx"));
            let path = [beside.as_path(), Path::new("csrc"), Path::new("ptx")]
                .iter()
                .find_map(|d| fs::canonicalize(d.join(&name)).ok());
            found.extend(path.filter(|p| !found.contains(p)));
        }
        at += 1;
    }
    found
}

/// FNV-1a.
fn hash(bytes: &[u8], seed: u64) -> u64 {
    let start = seed ^ 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(start, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(feature = "bindgen")]
fn bindings() {
    let include = Command::new("cc").arg("-print-file-name=include").output().unwrap().stdout;
    let text = bindgen::Builder::default()
        .header("csrc/kvwarp.h")
        .clang_args(["-Icsrc", "-fparse-all-comments", "-isystem"])
        .clang_arg(String::from_utf8(include).unwrap().trim())
        .allowlist_item("(kvw|KVW)_.*")
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .derive_default(true)
        .use_core()
        .generate()
        .unwrap_or_else(|e| fail(&format!("bindgen: {e}")))
        .to_string();
    if env::var_os("KVW_BLESS").is_some() {
        fs::write("src/ffi.rs", &text).unwrap();
    }
    fs::write(PathBuf::from(env::var_os("OUT_DIR").unwrap()).join("ffi.rs"), text).unwrap();
}

/// Standard error of a command that must succeed.
fn run(command: &mut Command) -> String {
    match command.output() {
        Ok(o) if o.status.success() => String::from_utf8_lossy(&o.stderr).into_owned(),
        Ok(o) => fail(&format!("{command:?}\n{}", String::from_utf8_lossy(&o.stderr))),
        Err(e) => fail(&format!("{command:?}: {e}")),
    }
}

fn fail(why: &str) -> ! {
    why.lines().take(40).for_each(|line| println!("cargo::error={line}"));
    exit(1)
}
