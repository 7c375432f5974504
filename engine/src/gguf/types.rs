//! Tensor element types of the format, with the size of their blocks.

/// Declares the types as `Name = id, elements a block, bytes a block`.
macro_rules! ggml_types {
    ($($name:ident = $id:literal, $elements:literal, $bytes:literal;)*) => {
        /// Element type of a tensor, named as the format names it.
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum GgmlType { $($name),* }

        impl GgmlType {
            /// The type with this number in the file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            /// The number of this type in the file.
            pub fn id(self) -> u32 {
                match self { $(Self::$name => $id),* }
            }

            /// Elements and bytes of one block.
            pub fn block(self) -> (u64, u64) {
                match self { $(Self::$name => ($elements, $bytes)),* }
            }
        }
    };
}

ggml_types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q8_1 = 9, 32, 36;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    I8 = 24, 1, 1;
    I16 = 25, 1, 2;
    I32 = 26, 1, 4;
    I64 = 27, 1, 8;
    F64 = 28, 1, 8;
    IQ1_M = 29, 256, 56;
    BF16 = 30, 1, 2;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
}

impl GgmlType {
    /// Bytes of a tensor of this shape (fastest extent first); `None` on overflow or a partial
    /// block in a row.
    pub fn bytes(self, shape: &[u64; 4]) -> Option<u64> {
        let (elements, bytes) = self.block();
        if !shape[0].is_multiple_of(elements) {
            return None;
        }
        shape[1..]
            .iter()
            .try_fold((shape[0] / elements).checked_mul(bytes)?, |n, &extent| n.checked_mul(extent))
    }
}
