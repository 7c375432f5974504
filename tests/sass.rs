//! What nvcc made of the kernels: registers, local memory and the instructions of hot loops, held to the table
//! `tests/sass.txt`. Needs a build with kernels and cuobjdump with nvdisasm; no GPU.
//!
//! The hot path of a kernel is found in its SASS: among the ways once round a loop without inner turns, those with
//! the most HMMA that also start a copy (LDGSTS, UBLKCP), and of those the shortest. In the attention kernels that is a
//! 2-bit slab in the middle of a sequence: found, prefetched, attended to; masks, batches of page table entries, rescaling
//! and changes of format are off the path.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const ARCHS: [&str; 3] = ["sm_80", "sm_89", "sm_90a"];
const TABLE: &str = "tests/sass.txt";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Usage {
    registers: usize,
    local_bytes: usize,
    hmma: usize,
    hot_path: usize,
}

/// Instructions of one function: address and text.
type Listing = Vec<(usize, String)>;

/// `(cost so far)` of reaching an instruction, by whether a copy has been started: most HMMA, then fewest others.
type Reached = [Option<(usize, std::cmp::Reverse<usize>)>; 2];

/// HMMA and instructions of the hot path; zeros where no loop holds both an HMMA and a copy.
fn hot_path(code: &Listing) -> (usize, usize) {
    let index: HashMap<usize, usize> = code.iter().enumerate().map(|(i, c)| (c.0, i)).collect();
    let target = |i: usize| target(code, &index, i);
    let mut best = (0, std::cmp::Reverse(0));
    for back in 0..code.len() {
        let Some(head) = target(back).filter(|&head| head < back) else { continue };
        let mut reached: Vec<Reached> = vec![[None; 2]; back - head + 2];
        reached[0][0] = Some((0, std::cmp::Reverse(0)));
        for i in head..=back {
            let text = &code[i].1;
            let predicated = text.starts_with('@');
            let leaves = !predicated && (text.contains("EXIT") || text.contains("BRX"));
            let always = text.contains("BRA ") && !predicated && !text.contains('P');
            let (hmma, nop) = (text.contains("HMMA"), text.contains("NOP"));
            for copied in 0..2 {
                let Some((h, n)) = reached[i - head][copied] else { continue };
                let cost =
                    Some((h + usize::from(hmma), std::cmp::Reverse(n.0 + usize::from(!nop))));
                let copies = ["LDGSTS", "UBLKCP"].iter().any(|copy| text.contains(copy));
                let to = copied | usize::from(copies);
                let mut step = |next: usize| {
                    let slot = &mut reached[next - head][to];
                    *slot = (*slot).max(cost);
                };
                match target(i) {
                    _ if leaves => {}
                    Some(jump) if i < back && jump > i && jump <= back => {
                        step(jump);
                        if !always {
                            step(i + 1);
                        }
                    }
                    Some(_) if always && i < back => {}
                    _ => step(i + 1),
                }
            }
        }
        best = best.max(reached[back - head + 1][1].unwrap_or_default());
    }
    if best.0 == 0 { (0, 0) } else { (best.0, best.1.0) }
}

/// Where a branch goes, as an index.
fn target(code: &Listing, index: &HashMap<usize, usize>, i: usize) -> Option<usize> {
    let text = &code[i].1;
    let at = text.contains("BRA").then(|| text.rfind("0x")).flatten()?;
    let digits = text[at + 2..].split(|c: char| !c.is_ascii_hexdigit()).next()?;
    index.get(&usize::from_str_radix(digits, 16).ok()?).copied()
}

/// Instructions of the innermost loops in which lanes of a warp vote or exchange words.
fn warp_loops(code: &Listing) -> Vec<usize> {
    let index: HashMap<usize, usize> = code.iter().enumerate().map(|(i, c)| (c.0, i)).collect();
    let backward = (0..code.len()).filter_map(|i| Some((target(code, &index, i)?, i)));
    let loops: Vec<_> = backward.filter(|(head, back)| head < back).collect();
    let of_warp = |&&(head, back): &&(usize, usize)| {
        let inner = loops.iter().any(|&(h, b)| (h, b) != (head, back) && head <= h && b <= back);
        let votes =
            |(_, text): &(usize, String)| text.contains("VOTE") || text.contains("SHFL.BFLY");
        !inner && code[head..=back].iter().any(votes)
    };
    loops.iter().filter(of_warp).map(|(head, back)| back - head + 1).collect()
}

/// Functions of `cuobjdump -sass`: mangled name and listing.
fn listings(sass: &str) -> Vec<(String, Listing)> {
    let mut all: Vec<(String, Listing)> = Vec::new();
    for line in sass.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function : ") {
            all.push((name.into(), Vec::new()));
        } else if let Some((address, rest)) =
            line.strip_prefix("/*").and_then(|l| l.split_once("*/"))
        {
            let Some((text, _)) = rest.split_once(';') else { continue };
            let (Ok(address), Some(last)) = (usize::from_str_radix(address, 16), all.last_mut())
            else {
                continue;
            };
            last.1.push((address, text.trim().to_owned()));
        }
    }
    all
}

/// Registers and bytes of stack and local memory by mangled name, from `cuobjdump -res-usage`.
fn resources(text: &str) -> HashMap<String, (usize, usize)> {
    let mut all = HashMap::new();
    let mut name = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("Function ") {
            name = rest.trim_end_matches(':').to_owned();
        } else if line.starts_with("REG:") {
            let field = |key: &str| -> usize {
                let value = line.split_whitespace().find_map(|f| f.strip_prefix(key));
                value.and_then(|v| v.parse().ok()).unwrap_or(0)
            };
            let usage = (field("REG:"), field("STACK:") + field("LOCAL:"));
            all.insert(std::mem::take(&mut name), usage);
        }
    }
    all
}

fn output(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// `KVW_CUOBJDUMP`, or beside nvcc, or on the path.
fn cuobjdump() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates: Vec<PathBuf> =
        env::var_os("KVW_CUOBJDUMP").map(Into::into).into_iter().collect();
    candidates
        .extend(env::var_os("KVW_NVCC").map(|p| PathBuf::from(p).with_file_name("cuobjdump")));
    candidates.extend(env::var_os("CUDA_HOME").map(|p| Path::new(&p).join("bin/cuobjdump")));
    candidates.extend(env::split_paths(&path).map(|d| d.join("cuobjdump")));
    candidates.into_iter().find(|p| p.is_file())
}

/// What cuobjdump says of the library for `arch`.
fn dump(tool: &Path, library: &str, arch: &str, what: &[&str]) -> String {
    let path = env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", tool.parent().unwrap().display());
    output(Command::new(tool).env("PATH", path).args(["-arch", arch]).args(what).arg(library))
}

/// Usage of every kernel of the library for `arch`, by demangled name.
fn measure(tool: &Path, library: &str, arch: &str) -> BTreeMap<String, Usage> {
    let resources = resources(&dump(tool, library, arch, &["-res-usage"]));
    let mut all = BTreeMap::new();
    for (mangled, code) in listings(&dump(tool, library, arch, &["-sass"])) {
        let name = output(Command::new("c++filt").arg(&mangled));
        let name = name.replace("(anonymous namespace)::", "").replace("void ", "");
        let (registers, local_bytes) = resources[&mangled];
        let (hmma, hot_path) = hot_path(&code);
        let usage = Usage { registers, local_bytes, hmma, hot_path };
        let name = name.trim().replace(", ", ",");
        assert!(all.insert(name.clone(), usage).is_none(), "two kernels are called {name}");
    }
    all
}

#[test]
fn the_hot_path_skips_what_is_branched_over() {
    let sass = "Function : k\n/*0000*/ MOV R1, R2 ;\n/*0010*/ HMMA R4 ;\n/*0020*/ @P0 BRA 0x50 ;\n\
        /*0030*/ FMUL R3 ;\n/*0040*/ FMUL R3 ;\n/*0050*/ @!P1 BRA 0x70 ;\n/*0060*/ LDGSTS [R1] ;\n\
        /*0070*/ NOP ;\n/*0080*/ @P2 BRA 0x10 ;\n/*0090*/ EXIT ;\n";
    let functions = listings(sass);
    assert_eq!((functions[0].0.as_str(), functions[0].1.len()), ("k", 10));
    assert_eq!(hot_path(&functions[0].1), (1, 5)); // HMMA, BRA, BRA, LDGSTS, BRA
    assert_eq!(warp_loops(&functions[0].1), []);
    let votes = sass.replace("HMMA R4", "VOTE.ANY R4");
    assert_eq!(warp_loops(&listings(&votes)[0].1), [8]);
}

/// The library and cuobjdump; `None`, and a word about it, where there is none.
fn kernels() -> Option<(&'static str, PathBuf)> {
    let found = option_env!("KVW_KERNELS").zip(cuobjdump());
    if found.is_none() {
        assert!(env::var_os("KVW_REQUIRE_CUDA").is_none(), "no kernels built, or no cuobjdump");
        eprintln!("skipped: no kernels built, or no cuobjdump");
    }
    found
}

/// A kernel in `ptx/` is there because its loops are shorter than those of the same in CUDA C++: turning words, counting
/// distances, giving places, as `ptx/README.md` has them.
#[test]
fn ptx_is_shorter() {
    let Some((library, tool)) = kernels() else { return };
    let listing = |arch, name| {
        let sass = dump(&tool, library, arch, &["-sass", "-fun", name]);
        warp_loops(&listings(&sass).into_iter().next().unwrap_or_else(|| panic!("{name}")).1)
    };
    let table = fs::read_to_string("ptx/README.md").unwrap();
    for arch in ARCHS {
        let ptx = listing(arch, "kvw_represent");
        let cpp = listing(arch, "_ZN3kvw9representE20kvw_sim_evict_params");
        assert_eq!((ptx.len(), cpp.len()), (3, 3), "{arch}: {ptx:?} {cpp:?}");
        assert!(ptx.iter().zip(&cpp).all(|(a, b)| a < b), "{arch}: {ptx:?} {cpp:?}");
        let cells: Vec<String> = ptx.iter().zip(&cpp).map(|(a, b)| format!("{a} of {b}")).collect();
        let row = format!("| {arch} | {} |", cells.join(" | "));
        assert!(table.contains(&row), "ptx/README.md lacks {row}");
    }
}

#[test]
fn kernels_stay_within_their_table() {
    let Some((library, tool)) = kernels() else { return };
    let mut text =
        String::from("# kernel: registers, HMMA of the hot path, its instructions; on each of ");
    text += &format!(
        "{}\n# KVW_BLESS=1 cargo test sass rewrites this file; nvcc 13.0.88\n",
        ARCHS.join(", ")
    );
    let archs = ARCHS.map(|arch| measure(&tool, library, arch));
    for name in archs[0].keys() {
        let row = archs.each_ref().map(|a| {
            let u = a[name];
            assert_eq!(u.local_bytes, 0, "{name} uses local memory");
            format!("{} {} {}", u.registers, u.hmma, u.hot_path)
        });
        text += &format!("{name}: {}\n", row.join(" | "));
    }
    let hot = |a: &BTreeMap<String, Usage>| {
        let decode = |name: &str| {
            name.starts_with("attn<128,32,1,") && name.ends_with("(kvw_paged_attn_params)")
        };
        *a.iter().find(|(name, _)| decode(name)).expect("the decode kernel").1
    };
    for usage in archs.each_ref().map(hot) {
        assert!(usage.hmma == 84 && usage.hot_path <= 760 && usage.registers <= 168, "{usage:?}");
    }
    if env::var_os("KVW_BLESS").is_some() {
        fs::write(TABLE, &text).unwrap();
    }
    assert!(
        fs::read_to_string(TABLE).unwrap() == text,
        "{TABLE} is not what nvcc made now:\n{text}"
    );
}
