//! Adam (arXiv:1412.6980), with steps that are a share of how large a matrix is.

use faer::Mat;

use super::block::Weights;

/// Decay of the means of gradients and of their squares.
const DECAY: [f32; 2] = [0.9, 0.99];
/// Of the root of the mean square of a matrix, what the first step changes an element by.
const RATE: f32 = 0.01;
const TINY: f32 = 1e-20;

/// Means so far.
pub struct Adam {
    means: [Weights; 2],
    /// Of a step, by matrix.
    rates: [f32; 6],
    /// What the means are short of, as they began with zeros.
    short: [f32; 2],
}

impl Adam {
    pub fn new(weights: &Weights) -> Self {
        let zeros = || weights.each_ref().map(|w| Mat::zeros(w.nrows(), w.ncols()));
        let rate = |w: &Mat<f32>| {
            let elements = (w.nrows() * w.ncols()).max(1) as f32;
            RATE * (w.squared_norm_l2() / elements).sqrt()
        };
        Self { means: [zeros(), zeros()], rates: weights.each_ref().map(rate), short: [1.0; 2] }
    }

    /// Moves `weights` against the sum of `gradients`, `share` of a first step's way.
    pub fn step(&mut self, weights: &mut Weights, gradients: &[(f64, Weights)], share: f32) {
        let [first, second] = &mut self.means;
        (0..2).for_each(|i| self.short[i] *= DECAY[i]);
        let full = self.short.map(|short| 1.0 / (1.0 - short));
        for (m, w) in weights.iter_mut().enumerate() {
            let rate = share * self.rates[m];
            for j in 0..w.ncols() {
                for i in 0..w.nrows() {
                    let x: f32 = gradients.iter().map(|(_, gradient)| gradient[m][(i, j)]).sum();
                    let mean = &mut first[m][(i, j)];
                    *mean += (1.0 - DECAY[0]) * (x - *mean);
                    let square = &mut second[m][(i, j)];
                    *square += (1.0 - DECAY[1]) * (x * x - *square);
                    let [mean, square] = [*mean * full[0], *square * full[1]];
                    w[(i, j)] -= rate * mean / (square.sqrt() + TINY);
                }
            }
        }
    }
}
