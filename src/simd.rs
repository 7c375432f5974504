//! Which vector instructions the CPU paths may use, decided once at run time.

use std::sync::OnceLock;

/// A set of instructions; each level includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust, any architecture.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
}

impl Level {
    /// The best level of this CPU, or a lower one named by `KVW_SIMD=portable|avx2|avx512`. An unknown
    /// name and a level that the CPU lacks change nothing.
    #[must_use]
    pub fn detect() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let best = Self::of_cpu();
            let named = std::env::var("KVW_SIMD").ok().and_then(|name| Self::from_name(&name));
            named.map_or(best, |level| level.min(best))
        })
    }

    /// Every level this CPU can run, lowest first: for tests that compare them.
    pub fn available() -> impl Iterator<Item = Self> {
        let best = Self::of_cpu();
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(move |&level| level <= best)
    }

    /// `portable`, `avx2` or `avx512`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Self::Portable),
            "avx2" => Some(Self::Avx2),
            "avx512" => Some(Self::Avx512),
            _ => None,
        }
    }

    /// This level, or the best one of this CPU if that is lower: what a dispatcher may rely on.
    #[must_use]
    pub fn usable(self) -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        self.min(*BEST.get_or_init(Self::of_cpu))
    }

    #[cfg(target_arch = "x86_64")]
    fn of_cpu() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_cpu() -> Self {
        Self::Portable
    }
}

/// Makes `fn name(level, args)` that calls the `#[inline(always)]` function `body(args)`, compiled once
/// for each level, so that plain loops vectorise with that level's instructions.
#[macro_export]
macro_rules! leveled {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;
    ) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            match level.usable() {
                // SAFETY: `usable` answers with levels that this CPU has.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => $body($($arg),*),
            }
        }
    };
}
pub use crate::leveled;
