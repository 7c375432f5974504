//! The body of a kernel in `ptx/` as C++ for the executor: a statement an instruction, a variable a register.
//!
//! Knows the instructions that those kernels use, in the forms that they use, and refuses any other. A line that ends in
//! `//! N instruction;` is that instruction instead under the planted fault `N` (nothing where there is none). Shared
//! memory has 32-bit addresses: the array's number in the top byte. Reports name the lines of the PTX.

use std::fmt::Write;

/// What the translation of `path`, whose text this is, needs around it: parameters named `<entry>_param_<n>` as byte
/// pointers. The error names the line.
pub fn to_cpp(path: &str, text: &str) -> Result<String, String> {
    let mut body = Body::default();
    let (mut out, mut inside) = (String::new(), false);
    for (i, line) in text.lines().enumerate() {
        match line.trim() {
            "{" => inside = true,
            "}" => inside = false,
            _ if !inside => {}
            line => {
                let fail = |why: String| format!("{path}:{}: {why}: {line}", i + 1);
                let cpp = body.line(line).map_err(fail)?;
                if !cpp.is_empty() {
                    writeln!(out, "#line {} \"{path}\"\n{cpp}", i + 1).expect("a string");
                }
            }
        }
    }
    let Body { shared, arrays } = body;
    Ok(format!("{shared}unsigned char* const ptx_shared[] = {{{}}};\n{out}", arrays.join(", ")))
}

#[derive(Default)]
struct Body {
    /// Declarations of shared arrays, and their names.
    shared: String,
    arrays: Vec<String>,
}

impl Body {
    fn line(&mut self, line: &str) -> Result<String, String> {
        let (line, fault) = match line.split_once("//!") {
            Some((line, fault)) => (line, Some(fault.trim())),
            None => (line.split("//").next().unwrap_or(line), None),
        };
        let line = line.trim();
        if let Some(label) = line.strip_suffix(':') {
            return Ok(format!("{label}:;"));
        }
        if line.is_empty() {
            return Ok(String::new());
        }
        let plain = self.statement(line)?;
        let Some(fault) = fault else { return Ok(plain) };
        let (number, instead) = fault.split_once(' ').unwrap_or((fault, ""));
        let instead = if instead.is_empty() { String::new() } else { self.statement(instead)? };
        Ok(format!("if (KVW_FAULT({number})) {{ {instead} }} else {{ {plain} }}"))
    }

    fn statement(&mut self, line: &str) -> Result<String, String> {
        let line = line.strip_suffix(';').ok_or("no semicolon")?;
        let (guard, line) = match line.strip_prefix('@') {
            Some(rest) => rest.split_once(' ').ok_or("a guard alone")?,
            None => ("", line),
        };
        let (op, operands) = line.split_once(' ').unwrap_or((line, ""));
        let parts: Vec<&str> = op.split('.').collect();
        let operands: Vec<&str> = operands.split(',').map(str::trim).collect();
        let cpp = match parts[0] {
            "" => self.directive(&parts, &operands)?,
            _ => self.instruction(op, &parts, &operands)?,
        };
        Ok(if guard.is_empty() { cpp } else { format!("if ({guard}) {{ {cpp} }}") })
    }

    /// `.reg .b32 a, b` and `.shared .align 16 .b8 name[bytes]`.
    fn directive(&mut self, parts: &[&str], operands: &[&str]) -> Result<String, String> {
        let words: Vec<&str> = operands[0].split(' ').collect();
        match (parts[1], words[..].first()) {
            ("reg", Some(&width)) => {
                let names = operands.join(", ");
                let names = names.split_once(' ').ok_or("no name")?.1;
                Ok(format!("{} {names};", c_type(&width[1..])?))
            }
            ("shared", _) => {
                let (name, bytes) = words
                    .last()
                    .and_then(|w| w.strip_suffix(']')?.split_once('['))
                    .ok_or("no size")?;
                writeln!(self.shared, "KVW_SHARED(unsigned char, {name}, {bytes});")
                    .expect("a string");
                self.arrays.push(name.to_owned());
                Ok(String::new())
            }
            _ => Err("unknown directive".into()),
        }
    }

    /// An operand that is read.
    fn value(&self, operand: &str) -> String {
        if let Some(i) = self.arrays.iter().position(|a| a == operand) {
            return format!("{i}u << 24");
        }
        match operand {
            "%tid.x" => "threadIdx.x".into(),
            "%ctaid.x" => "blockIdx.x".into(),
            "%lanemask_lt" => "(1u << threadIdx.x % 32) - 1".into(),
            "%lanemask_eq" => "1u << threadIdx.x % 32".into(),
            _ if operand.starts_with("0x") && operand.len() > 10 => format!("{operand}ull"),
            _ => operand.into(),
        }
    }

    /// `[base + offset]` of a space, as a pointer to `of`.
    fn memory(&self, operand: &str, space: &str, of: &str) -> Result<String, String> {
        let inner =
            operand.strip_prefix('[').and_then(|o| o.strip_suffix(']')).ok_or("no address")?;
        let (base, offset) = inner.split_once(" + ").unwrap_or((inner, "0"));
        let at = match space {
            "param" => format!("{base} + {offset}"),
            "global" => format!("reinterpret_cast<unsigned char*>({base}) + {offset}"),
            "shared" => {
                format!("ptx_shared[({base} + {offset}) >> 24] + (({base} + {offset}) & 0xFFFFFF)")
            }
            _ => return Err("unknown space".into()),
        };
        let of = if space == "param" { format!("const {of}") } else { of.into() };
        Ok(format!("*reinterpret_cast<{of}*>({at})"))
    }

    fn instruction(&self, op: &str, parts: &[&str], operands: &[&str]) -> Result<String, String> {
        let to = operands[0];
        let v: Vec<String> =
            operands[1.min(operands.len())..].iter().map(|o| self.value(o)).collect();
        let kind = parts[parts.len() - 1];
        let typed = |i: usize| -> Result<String, String> {
            Ok(format!("{}({})", c_type(kind)?, v.get(i).ok_or("too few operands")?))
        };
        let binary =
            |sign: &str| Ok::<_, String>(format!("{to} = {} {sign} {};", typed(0)?, typed(1)?));
        match (parts[0], parts.get(1).copied().unwrap_or("")) {
            ("ld", space) => {
                Ok(format!("{to} = {};", self.memory(operands[1], space, c_type(kind)?)?))
            }
            ("st", space) => Ok(format!("{} = {};", self.memory(to, space, c_type(kind)?)?, v[0])),
            ("mov", _) => Ok(format!("{to} = {};", typed(0)?)),
            ("cvta", "to") | ("cvt", _) => Ok(format!("{to} = {};", c_cast(parts, &v[0])?)),
            ("add", _) => binary("+"),
            ("sub", _) => binary("-"),
            ("and", "pred") => Ok(format!("{to} = {} && {};", v[0], v[1])),
            ("and", _) => binary("&"),
            ("xor", _) => binary("^"),
            ("div", "u64") => binary("/"),
            ("mul", "lo") => binary("*"),
            ("mul", "wide") => Ok(format!("{to} = uint64_t({}) * {};", typed(0)?, typed(1)?)),
            ("mul", "hi") if kind == "u64" => Ok(format!("{to} = __umul64hi({}, {});", v[0], v[1])),
            ("not", _) => Ok(format!("{to} = ~{};", v[0])),
            ("min" | "max", _) => {
                let sign = if parts[0] == "min" { "<" } else { ">" };
                Ok(format!("{to} = {0} {sign} {1} ? {0} : {1};", typed(0)?, typed(1)?))
            }
            ("shl", _) => Ok(format!("{to} = {} << {};", typed(0)?, v[1])),
            ("shr", _) => Ok(format!(
                "{to} = {1} > {bits} ? 0 : {0} >> {1};",
                typed(0)?,
                v[1],
                bits = bits(kind)? - 1
            )),
            ("shf", side @ ("l" | "r")) if parts[2] == "wrap" => {
                Ok(format!("{to} = __funnelshift_{side}({}, {}, {});", v[0], v[1], v[2]))
            }
            ("lop3", _) => {
                Ok(format!("{to} = prim::lop3<{}>({}, {}, {});", v[3], v[0], v[1], v[2]))
            }
            ("popc", _) => Ok(format!("{to} = __popc({});", v[0])),
            ("selp", _) => {
                Ok(format!("{to} = {} ? uint32_t({}) : uint32_t({});", v[2], v[0], v[1]))
            }
            ("setp", compare) => {
                let sign = compare_sign(compare)?;
                let also = if parts[2] == "and" { format!(" && {}", v[2]) } else { String::new() };
                Ok(format!("{to} = {} {sign} {}{also};", typed(0)?, typed(1)?))
            }
            ("vote", "sync") if parts[2] == "ballot" => {
                Ok(format!("{to} = __ballot_sync({}, {});", v[1], v[0]))
            }
            ("redux", "sync") if parts[2] == "add" => {
                Ok(format!("{to} = __reduce_add_sync({}, {});", v[1], v[0]))
            }
            ("shfl", "sync") => shuffle(parts[2], to, &v),
            ("bar", "sync") if to == "0" => Ok("__syncthreads();".into()),
            ("bra", "") => Ok(format!("goto {to};")),
            ("ret", "") => Ok("return;".into()),
            _ => Err(format!("`{op}` is not known")),
        }
    }
}

fn shuffle(kind: &str, to: &str, v: &[String]) -> Result<String, String> {
    let (to, there) = to.split_once('|').unwrap_or((to, ""));
    let [x, by, clamp, mask] = v else { return Err("four operands".into()) };
    Ok(match (kind, clamp.as_str()) {
        ("bfly", "31") if there.is_empty() => format!("{to} = __shfl_xor_sync({mask}, {x}, {by});"),
        ("idx", "31") if there.is_empty() => format!("{to} = __shfl_sync({mask}, {x}, {by} & 31);"),
        ("up", "0") => {
            format!("{to} = __shfl_up_sync({mask}, {x}, {by}); {there} = threadIdx.x % 32 >= {by};")
        }
        _ => return Err("this form of shuffle is not known".into()),
    })
}

/// A conversion between unsigned integers, or of an address to another space.
fn c_cast(parts: &[&str], x: &str) -> Result<String, String> {
    match parts {
        ["cvta", "to", "global", "u64"] => Ok(x.into()),
        ["cvt", to, from] if from.starts_with('u') => Ok(format!("{}({x})", c_type(to)?)),
        _ => Err("this conversion is not known".into()),
    }
}

fn compare_sign(compare: &str) -> Result<&'static str, String> {
    Ok(match compare {
        "eq" => "==",
        "ne" => "!=",
        "lt" => "<",
        "le" => "<=",
        "gt" => ">",
        "ge" => ">=",
        _ => return Err("this comparison is not known".into()),
    })
}

fn bits(kind: &str) -> Result<u32, String> {
    kind.get(1..).and_then(|bits| bits.parse().ok()).ok_or(format!("type {kind}"))
}

fn c_type(kind: &str) -> Result<&'static str, String> {
    Ok(match kind {
        "pred" => "bool",
        "b32" | "u32" => "uint32_t",
        "s32" => "int32_t",
        "b64" | "u64" => "uint64_t",
        _ => return Err(format!("type {kind} is not known")),
    })
}
