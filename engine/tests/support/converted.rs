//! Small conversions, and what models say.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use kvwarp_engine::convert::{Budget, ConvertError, Converted, Request, Target, convert};
use kvwarp_engine::model::Work;
use kvwarp_engine::source::Source;
use kvwarp_engine::watch::Watch;

use super::models::model;

/// A conversion of a fixture that keeps so much, without recovery.
pub fn request(tokens: &[u32], pairs: usize, rank: usize) -> Request<'_> {
    let (learn, held) = tokens.split_at(tokens.len() * 3 / 4);
    Request {
        target: Target::Fixed(Budget { pairs, rank }),
        by_layer: false,
        whiten: true,
        refit: false,
        distil: 0,
        tokens: learn,
        searched: learn.len(),
        window: 64,
        chosen_on: held,
        held,
    }
}

/// Converts, and stops after `most` steps.
pub fn stopped(
    source: &Source,
    request: &Request<'_>,
    beside: &Path,
    most: usize,
) -> Result<Converted, ConvertError> {
    counted(source, request, beside, most).0
}

/// The same, and how many steps there were.
pub fn counted(
    source: &Source,
    request: &Request<'_>,
    beside: &Path,
    most: usize,
) -> (Result<Converted, ConvertError>, usize) {
    let (stop, mut steps) = (AtomicBool::new(false), 0);
    let mut step = |_| {
        steps += 1;
        stop.store(steps >= most, Ordering::Relaxed);
    };
    let mut watch = Watch::new(&stop, &mut step);
    let done = convert((source, &model(source)), request, beside, &mut watch, &mut |_| {});
    (done, steps)
}

pub fn converted(source: &Source, request: &Request<'_>) -> Converted {
    let folder = tempfile::tempdir().unwrap();
    stopped(source, request, &folder.path().join("state"), usize::MAX).unwrap()
}

/// Logits after each token of `tokens`, read together or one by one.
pub fn logits(source: &Source, tokens: &[u32], spec: &str, piece: usize) -> Vec<f32> {
    let model = model(source);
    let mut cache = model.cache(&spec.parse().unwrap(), tokens.len()).unwrap();
    let (row, mut work, mut all) = (cache.open(), Work::default(), Vec::new());
    for tokens in tokens.chunks(piece) {
        if piece == 1 {
            model.step(&[(row, tokens)], &mut cache, &mut work).unwrap();
            all.extend_from_slice(work.logits());
            continue;
        }
        let (stop, mut step) = (AtomicBool::new(false), |_| {});
        let take = &mut |row: &[f32]| all.extend_from_slice(row);
        let watch = &mut Watch::new(&stop, &mut step);
        model.score(tokens, (&mut cache, row), &mut work, watch, take).unwrap();
    }
    all
}

/// Largest difference.
pub fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|x| x.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
