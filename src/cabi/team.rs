//! The threads that all calls share.

use crate::threads::{Team, physical_cores};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A team and the process that started it: threads do not survive `fork()`.
struct Started {
    process: u32,
    team: Team,
}

static STARTED: AtomicPtr<Started> = AtomicPtr::new(std::ptr::null_mut());

/// This process's team, started by its first call: `KVW_THREADS` workers, or one a physical core.
///
/// A team is never dropped: there are two only where a process has forked, or where two threads made the first calls.
pub(super) fn team() -> &'static Team {
    let process = std::process::id();
    let seen = STARTED.load(Ordering::Acquire);
    // SAFETY: what was published is never freed.
    match unsafe { seen.as_ref() } {
        Some(started) if started.process == process => &started.team,
        _ => start(process, seen),
    }
}

#[cold]
fn start(process: u32, seen: *mut Started) -> &'static Team {
    let asked = std::env::var("KVW_THREADS").ok().and_then(|n| n.parse().ok());
    let workers = asked.filter(|n| (1..=1024).contains(n)).unwrap_or_else(physical_cores);
    let new = Box::into_raw(Box::new(Started { process, team: Team::new(workers) }));
    match STARTED.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: published, so never freed.
        Ok(_) => &unsafe { &*new }.team,
        Err(other) => {
            // SAFETY: `new` was not published; `other` was, by a thread of this process.
            unsafe {
                drop(Box::from_raw(new));
                &(*other).team
            }
        }
    }
}
