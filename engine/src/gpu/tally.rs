//! What a GPU's memory is taken for.

/// What bytes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Matrices, norms, biases and other constants.
    Weights,
    /// Slabs that sequences share.
    Pools,
    /// Each sequence's newest tokens, and page tables.
    Rings,
    /// Rows of a prompt or a step on their way through the layers.
    Activations,
    /// Scratch of ops, and what a step is told.
    Scratch,
}

/// Bytes by use.
pub type Bytes = [usize; Use::ALL.len()];

impl Use {
    /// Every one, in order.
    pub const ALL: [Self; 5] =
        [Self::Weights, Self::Pools, Self::Rings, Self::Activations, Self::Scratch];

    /// As reports have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Pools => "pools",
            Self::Rings => "rings",
            Self::Activations => "activations",
            Self::Scratch => "scratch",
        }
    }
}

/// Bytes taken now, and when they were the most.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    now: Bytes,
    most: Bytes,
}

impl Tally {
    /// Counts bytes that were taken.
    pub fn take(&mut self, of: Use, bytes: usize) {
        self.now[of as usize] += bytes;
        if self.now.iter().sum::<usize>() > self.most.iter().sum() {
            self.most = self.now;
        }
    }

    /// Counts bytes that were given back.
    pub fn give(&mut self, of: Use, bytes: usize) {
        self.now[of as usize] -= bytes;
    }

    /// Bytes when all of them were the most.
    pub fn most(&self) -> Bytes {
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_of_one_moment() {
        let mut tally = Tally::default();
        tally.take(Use::Weights, 10);
        tally.take(Use::Scratch, 5);
        tally.give(Use::Scratch, 5);
        tally.take(Use::Pools, 4);
        assert_eq!(tally.most(), [10, 0, 0, 0, 5]);
        tally.take(Use::Rings, 2);
        assert_eq!(tally.most(), [10, 4, 2, 0, 0]);
    }
}
