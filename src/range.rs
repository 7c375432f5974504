//! Ranges for profilers round what is enqueued.

/// Opens a range of this name until the end of the block; with feature `nvtx` alone.
macro_rules! range {
    ($name:expr) => {
        #[cfg(feature = "nvtx")]
        let _range = nvtx::LocalRange::new(nvtx::Str::from_str_lossy($name));
    };
}
pub(crate) use range;
