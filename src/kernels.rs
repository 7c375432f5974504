//! The ops of the C ABI as a table of functions: those of this build, or those of another library that exports them,
//! so that an engine is written once whoever runs its kernels.

use std::ffi::{CStr, c_char, c_void};
use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::ffi::{self, kvw_status, kvw_stream};
use crate::range::range;

/// What enqueues an op.
type Function<P> = unsafe extern "C" fn(*const P, kvw_stream) -> kvw_status;
/// What puts a status into words.
type Text = unsafe extern "C" fn(kvw_status) -> *const c_char;

/// One op: what enqueues it, the bytes that it must move, and what puts its status into words.
pub struct Op<P> {
    name: &'static str,
    function: Function<P>,
    bytes: unsafe extern "C" fn(*const P) -> usize,
    text: Text,
}

impl<P: Debug> Op<P> {
    /// Name of its family.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Bytes that it must move at the bounds which `args` names, lengths being the device's to know; 0 for arguments that
    /// it refuses.
    pub fn bytes(&self, args: &P) -> usize {
        // SAFETY: the function reads the struct's numbers and follows no pointer.
        unsafe { (self.bytes)(args) }
    }

    /// Enqueue it on `stream`; returns before it has run. `struct_size` of `args` must be set. With feature `nvtx` a
    /// range of its name is open meanwhile.
    ///
    /// # Errors
    /// [`Error::Invalid`] for refused arguments, [`Error::Cuda`] for a failed launch.
    ///
    /// # Safety
    /// Every pointer of `args` is null where that is allowed, or an address of as many elements as the op's header
    /// says, in memory that the op's library reads, which live until the op has run; nothing else writes them meanwhile.
    pub unsafe fn run(&self, args: &P, stream: kvw_stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { enqueue(self.name, (self.function, self.text), args, stream) }
    }
}

/// Enqueues the op of this name.
///
/// # Safety
/// As [`Op::run`].
pub(crate) unsafe fn enqueue<P: Debug>(
    op: &'static str,
    (function, text): (Function<P>, Text),
    args: &P,
    stream: kvw_stream,
) -> Result<()> {
    range!(op);
    // SAFETY: the caller's promise; the op reads `args` before it returns, its text is static and NUL-terminated.
    let (status, what) = unsafe {
        let status = function(args, stream);
        (status, CStr::from_ptr(text(status)).to_string_lossy().into_owned())
    };
    match status {
        0 => Ok(()),
        ..0 => Err(Error::Invalid { op, status, why: what, params: format!("{args:?}") }),
        code => Err(Error::Cuda { op, code, what }),
    }
}

macro_rules! kernels {
    ($($op:ident: $symbol:ident, $bytes:ident, $params:ident;)*) => {
        /// Every op.
        pub struct Kernels {
            $(
                #[doc = concat!("`", stringify!($symbol), "`")]
                pub $op: Op<ffi::$params>,
            )*
            paged_attn_workspace: unsafe extern "C" fn(*const ffi::kvw_paged_attn_params) -> usize,
            lowrank_kv_workspace: unsafe extern "C" fn(*const ffi::kvw_lowrank_kv_params) -> usize,
            token_select_workspace:
                unsafe extern "C" fn(*const ffi::kvw_token_select_params) -> usize,
        }

        impl Kernels {
            /// Those of this build; [`Error::NotBuilt`] where it has none.
            pub fn linked() -> Result<Self> {
                #[cfg(kvw_cuda)]
                return Ok(Self {
                    $($op: Op {
                        name: stringify!($op),
                        function: ffi::$symbol,
                        bytes: ffi::$bytes,
                        text: ffi::kvw_status_str,
                    },)*
                    paged_attn_workspace: ffi::kvw_paged_attn_workspace,
                    lowrank_kv_workspace: ffi::kvw_lowrank_kv_workspace,
                    token_select_workspace: ffi::kvw_token_select_workspace,
                });
                #[cfg(not(kvw_cuda))]
                Err(Error::NotBuilt)
            }

            /// Those of a library, by the address that `symbol` gives for a name.
            ///
            /// # Safety
            /// Each address is that of the function which kvwarp.h declares by the name, and stays so.
            pub unsafe fn loaded(symbol: impl Fn(&str) -> *const c_void) -> Self {
                // SAFETY: the caller's promise.
                unsafe {
                    Self {
                        $($op: Op {
                            name: stringify!($op),
                            function: std::mem::transmute::<*const c_void, Function<ffi::$params>>(
                                symbol(stringify!($symbol)),
                            ),
                            bytes: std::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn(*const ffi::$params) -> usize,
                            >(symbol(stringify!($bytes))),
                            text: std::mem::transmute::<*const c_void, Text>(symbol("kvw_status_str")),
                        },)*
                        paged_attn_workspace: std::mem::transmute::<
                            *const c_void,
                            unsafe extern "C" fn(*const ffi::kvw_paged_attn_params) -> usize,
                        >(symbol("kvw_paged_attn_workspace")),
                        lowrank_kv_workspace: std::mem::transmute::<
                            *const c_void,
                            unsafe extern "C" fn(*const ffi::kvw_lowrank_kv_params) -> usize,
                        >(symbol("kvw_lowrank_kv_workspace")),
                        token_select_workspace: std::mem::transmute::<
                            *const c_void,
                            unsafe extern "C" fn(*const ffi::kvw_token_select_params) -> usize,
                        >(symbol("kvw_token_select_workspace")),
                    }
                }
            }
        }
    };
}

kernels! {
    embed: kvw_embed, kvw_embed_bytes, kvw_embed_params;
    head_linear: kvw_head_linear, kvw_head_linear_bytes, kvw_head_linear_params;
    kv_gather: kvw_kv_gather, kvw_kv_gather_bytes, kvw_kv_gather_params;
    kv_pack: kvw_kv_pack, kvw_kv_pack_bytes, kvw_kv_pack_params;
    linear: kvw_linear, kvw_linear_bytes, kvw_linear_params;
    lowrank_kv: kvw_lowrank_kv, kvw_lowrank_kv_bytes, kvw_lowrank_kv_params;
    page_table: kvw_page_table, kvw_page_table_bytes, kvw_page_table_params;
    paged_attn: kvw_paged_attn, kvw_paged_attn_bytes, kvw_paged_attn_params;
    prefill_attn: kvw_prefill_attn, kvw_prefill_attn_bytes, kvw_prefill_attn_params;
    rms_norm: kvw_rms_norm, kvw_rms_norm_bytes, kvw_rms_norm_params;
    rope_select: kvw_rope_select, kvw_rope_select_bytes, kvw_rope_select_params;
    sample: kvw_sample, kvw_sample_bytes, kvw_sample_params;
    sim_evict: kvw_sim_evict, kvw_sim_evict_bytes, kvw_sim_evict_params;
    swiglu: kvw_swiglu, kvw_swiglu_bytes, kvw_swiglu_params;
    token_score: kvw_token_score, kvw_token_score_bytes, kvw_token_score_params;
    token_select: kvw_token_select, kvw_token_select_bytes, kvw_token_select_params;
}

impl Kernels {
    /// Scratch bytes of `paged_attn`; 0 for arguments that it refuses.
    pub fn paged_attn_workspace(&self, args: &ffi::kvw_paged_attn_params) -> usize {
        // SAFETY: the function reads the struct's numbers and follows no pointer.
        unsafe { (self.paged_attn_workspace)(args) }
    }

    /// Scratch bytes of `lowrank_kv`; 0 for arguments that it refuses, and for appends.
    pub fn lowrank_kv_workspace(&self, args: &ffi::kvw_lowrank_kv_params) -> usize {
        // SAFETY: as above.
        unsafe { (self.lowrank_kv_workspace)(args) }
    }

    /// Scratch bytes of `token_select`; 0 for arguments that it refuses, and for small selections.
    pub fn token_select_workspace(&self, args: &ffi::kvw_token_select_params) -> usize {
        // SAFETY: as above.
        unsafe { (self.token_select_workspace)(args) }
    }
}
