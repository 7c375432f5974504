//! What the parts of a cache spec demand of each other.

use kvwarp::slab::{Format, Meta};

use super::CacheSpec;
use crate::policy::Method;

impl CacheSpec {
    fn check_meta(&self) -> Result<(), String> {
        let only = |what: String| Err(format!("`meta` is `u8`; it is for {what}"));
        match *self {
            Self { meta: Meta::F16, .. } => Ok(()),
            Self { store: Format::Q8, .. } => only("q4 and q2, not q8".into()),
            Self { group: 128, .. } => only("a `group` of 32 or 64, not 128".into()),
            Self { kivi_exact: true, .. } => only("whole slabs, not for `kivi_exact`".into()),
            _ => Ok(()),
        }
    }

    /// What the parts that choose tokens demand of each other.
    fn check_choice(&self) -> Result<(), String> {
        let Self { evict, refine, budget, tsp, kivi_exact, .. } = *self;
        if kivi_exact && (evict.is_some() || tsp.is_some()) {
            return Err("`kivi_exact` counts every token; it goes without `evict` and `tsp`".into());
        }
        let Some(evict) = evict else {
            let part = refine.map(|_| "refine").or(budget.map(|_| "budget"));
            return part
                .map_or(Ok(()), |part| Err(format!("`{part}` has no effect without `evict`")));
        };
        let name = evict.name();
        match evict.method() {
            Method::Lag if refine.is_some() || budget.is_some() => Err(format!(
                "`{name}` chooses within partitions; `refine` and `budget` go with the other methods, such as lagkv-kvpress"
            )),
            Method::RepeatHeads if refine.is_some() || budget.is_some() => {
                Err(format!("`{name}` keeps whole heads; `refine` and `budget` go with kvzip"))
            }
            Method::Repeat | Method::RepeatHeads if tsp.is_some() => Err(format!(
                "`{name}` asks every layer about every token, `tsp` leaves some of them out; take another `evict`"
            )),
            _ => Ok(()),
        }
    }

    /// What the parts demand of each other.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { window, group, sinks, hadamard, range, .. } = *self;
        if self.kivi_exact && (hadamard || range < 100 || self.keep > 0) {
            return Err(
                "`kivi_exact` rounds as KIVI does; start from q2-kivi, or with hadamard=off".into(),
            );
        }
        self.check_meta()?;
        self.check_choice()?;
        if !self.kivi_exact {
            return Ok(());
        }
        if window == 0 || !window.is_multiple_of(group) {
            return Err(format!(
                "`window` is {window}; with `kivi_exact` a multiple of the group, {group}"
            ));
        }
        if sinks > 0 {
            return Err(format!(
                "`sinks` is {sinks}; KIVI has none, so `kivi_exact` allows only 0"
            ));
        }
        Ok(())
    }
}
