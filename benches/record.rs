//! What a run measured: rows, the CSV and JSON that keep them, and how they compare.
//!
//! A record is a CSV with `# key=value` lines on top (card, driver, date, commit). Peers write the same columns.

use std::fmt::Write as _;

/// One measured case.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Kernel family, such as `paged_attn`.
    pub family: String,
    /// Store of the cache, such as `q2g32`; the name of a peer's kernel; or what a plain layer works on.
    pub format: String,
    /// Query heads x kv heads d head size, or the size of a plain layer.
    pub shape: String,
    /// Tokens held by each sequence.
    pub context: usize,
    /// Sequences.
    pub batch: usize,
    /// Queries of each sequence.
    pub queries: usize,
    /// What else was chosen; empty for the defaults.
    pub variant: String,
    /// `graph`: a layer of a replayed graph of 32; `alone`: one launch between two events.
    pub mode: String,
    /// Microseconds: median, 10th and 90th percentile.
    pub us: [f64; 3],
    /// Bytes that the op must move, `kvw_<op>_bytes`.
    pub bytes: f64,
    /// Floating-point operations, where they are the limit; else 0.
    pub operations: f64,
    /// GB/s of a device-to-device copy in the same run, reads plus writes.
    pub copy: f64,
    /// Times measured.
    pub samples: usize,
}

const COLUMNS: &str = "family,format,shape,context,batch,queries,variant,mode,us,us_p10,us_p90,bytes,operations,\
    copy_gbps,samples,gbps,copy_percent,bits";

/// Median, 10th and 90th percentile.
pub fn percentiles(times: &[f64]) -> [f64; 3] {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |q: f64| sorted.get(((sorted.len() - 1) as f64 * q).round() as usize).copied();
    [0.5, 0.1, 0.9].map(|q| if sorted.is_empty() { f64::NAN } else { at(q).unwrap_or(f64::NAN) })
}

impl Row {
    pub fn gbps(&self) -> f64 {
        self.bytes / self.us[0] * 1e-3
    }

    pub fn tflops(&self) -> f64 {
        self.operations / self.us[0] * 1e-6
    }

    pub fn copy_percent(&self) -> f64 {
        100.0 * self.gbps() / self.copy
    }

    /// Bits read for each element of the cache that a sequence holds; NaN where there is no cache.
    pub fn bits(&self) -> f64 {
        let channels = || -> Option<f64> {
            let (heads, d) = self.shape.split_once('d')?;
            let (_, kv_heads) = heads.split_once('x')?;
            Some(kv_heads.parse::<f64>().ok()? * d.parse::<f64>().ok()?)
        };
        let elements = channels().map(|c| 2.0 * c * (self.context * self.batch) as f64);
        let attention = self.family == "paged_attn";
        elements.filter(|_| attention).map_or(f64::NAN, |e| 8.0 * self.bytes / e)
    }

    /// `family/format/shape/contextxbatch[/variant]/mode`, what filters look at.
    pub fn name(&self) -> String {
        let mut name = format!("{}/{}/{}", self.family, self.format, self.shape);
        if self.context > 0 {
            let _ = write!(name, "/{}x{}", self.context, self.batch);
        }
        if self.queries > 1 && self.family == "paged_attn" {
            let _ = write!(name, "/q{}", self.queries);
        }
        if !self.variant.is_empty() {
            let _ = write!(name, "/{}", self.variant);
        }
        name + "/" + &self.mode
    }

    /// The same work, whoever does it.
    fn same_work(&self, other: &Row) -> bool {
        let key = |r: &Row| {
            (r.family.clone(), r.shape.clone(), r.context, r.batch, r.queries, r.mode.clone())
        };
        key(self) == key(other)
    }

    /// How many times as fast as the fastest of `rows` that does the same work and that `who` accepts.
    pub fn speed_over(&self, rows: &[Row], who: impl Fn(&Row) -> bool) -> Option<f64> {
        let others = rows.iter().filter(|r| self.same_work(r) && who(r)).map(|r| r.us[0]);
        others.min_by(f64::total_cmp).map(|us| us / self.us[0])
    }

    fn csv(&self) -> String {
        let [us, p10, p90] = self.us;
        let Row { family, format, shape, context, batch, queries, variant, mode, .. } = self;
        format!(
            "{family},{format},{shape},{context},{batch},{queries},{variant},{mode},{us:.3},{p10:.3},{p90:.3},\
             {:.0},{:.0},{:.1},{},{:.1},{:.1},{:.3}",
            self.bytes,
            self.operations,
            self.copy,
            self.samples,
            self.gbps(),
            self.copy_percent(),
            self.bits()
        )
    }

    fn parse(line: &str) -> Option<Row> {
        let f: Vec<&str> = line.split(',').collect();
        let text = |i: usize| f.get(i).map(|s| (*s).to_owned());
        let number = |i: usize| f.get(i)?.parse::<f64>().ok();
        let count = |i: usize| f.get(i)?.parse::<usize>().ok();
        Some(Row {
            family: text(0)?,
            format: text(1)?,
            shape: text(2)?,
            context: count(3)?,
            batch: count(4)?,
            queries: count(5)?,
            variant: text(6)?,
            mode: text(7)?,
            us: [number(8)?, number(9)?, number(10)?],
            bytes: number(11)?,
            operations: number(12)?,
            copy: number(13)?,
            samples: count(14)?,
        })
    }

    fn json(&self) -> String {
        let values = self.csv();
        let fields = COLUMNS.split(',').map(str::trim).zip(values.split(','));
        let field = |(key, value): (&str, &str)| match value.parse::<f64>() {
            Ok(x) if x.is_finite() => format!("\"{key}\": {value}"),
            Ok(_) => format!("\"{key}\": null"),
            Err(_) => format!("\"{key}\": \"{value}\""),
        };
        format!("{{{}}}", fields.map(field).collect::<Vec<_>>().join(", "))
    }
}

/// Rows, and where they come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// `key=value`: gpu, driver, date, commit.
    pub facts: Vec<(String, String)>,
    pub rows: Vec<Row>,
}

impl Record {
    pub fn fact(&self, key: &str) -> &str {
        self.facts.iter().find(|f| f.0 == key).map_or("unknown", |f| &f.1)
    }

    pub fn to_csv(&self) -> String {
        let facts = self.facts.iter().map(|(k, v)| format!("# {k}={v}\n"));
        let rows = self.rows.iter().map(|r| r.csv() + "\n");
        facts.chain([COLUMNS.to_owned() + "\n"]).chain(rows).collect()
    }

    pub fn to_json(&self) -> String {
        let quote = |s: &str| s.replace('\\', "\\\\").replace('"', "\\\"");
        let fact = |(k, v): &(String, String)| format!("  \"{}\": \"{}\",\n", quote(k), quote(v));
        let rows: Vec<_> = self.rows.iter().map(|r| format!("    {}", r.json())).collect();
        let facts: String = self.facts.iter().map(fact).collect();
        format!("{{\n{facts}  \"rows\": [\n{}\n  ]\n}}\n", rows.join(",\n"))
    }

    /// Reads what [`Record::to_csv`] wrote; an error names the line.
    pub fn from_csv(text: &str) -> Result<Record, String> {
        let mut record = Record::default();
        for (i, line) in text.lines().enumerate() {
            if let Some(fact) = line.strip_prefix("# ") {
                let (key, value) = fact.split_once('=').unwrap_or((fact, ""));
                record.facts.push((key.into(), value.into()));
            } else if !line.is_empty() && !line.starts_with("family,") {
                let row = Row::parse(line).ok_or(format!("line {}: not a row: {line}", i + 1))?;
                record.rows.push(row);
            }
        }
        Ok(record)
    }
}

/// Whether a row is a peer's, by the bits of its cache: their names end in `_f16`, `_bf16` or `_fp8`.
pub fn peer(row: &Row, bits: usize) -> bool {
    let (_, element) = row.format.rsplit_once('_').unwrap_or_default();
    match bits {
        8 => element == "fp8",
        _ => element == "f16" || element == "bf16",
    }
}

/// The line that a case prints: times, rates, and how it compares with `rows` of the same run and with peers.
pub fn line(row: &Row, rows: &[Row]) -> String {
    let [us, p10, p90] = row.us;
    let mut out = format!("{:<58} {us:>9.2} us [{p10:.2} {p90:.2}]", row.name());
    if row.operations > 0.0 {
        let _ = write!(out, " {:>7.1} TFLOP/s", row.tflops());
    }
    let _ = write!(out, " {:>6.0} GB/s {:>5.1} % of copy", row.gbps(), row.copy_percent());
    if row.bits().is_finite() {
        let _ = write!(out, " {:>6.3} bits", row.bits());
    }
    let own = |r: &Row| r.format == "f16" && r.variant.is_empty() && row.format != "f16";
    let baselines = [
        ("own f16", row.speed_over(rows, own)),
        ("16-bit peer", row.speed_over(rows, |r| peer(r, 16))),
        ("fp8 peer", row.speed_over(rows, |r| peer(r, 8))),
    ];
    for (name, ratio) in baselines {
        if let Some(ratio) = ratio {
            let _ = write!(out, "  {ratio:.2}x {name}");
        }
    }
    out
}
