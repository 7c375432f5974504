//! What the system says of this machine's memory; nothing where there is no /proc.

use std::fs;

/// Bytes of `field`, a line of `file` in kB.
fn field(file: &str, field: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}

/// Bytes that programs may still take.
pub fn available() -> Option<usize> {
    field("/proc/meminfo", "MemAvailable:")
}

/// Most bytes that the process has had in memory, files that it maps included, since [`forget_peak`].
pub fn peak() -> Option<usize> {
    field("/proc/self/status", "VmHWM:")
}

/// Has the peak begin anew, where the system lets it.
pub fn forget_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}
