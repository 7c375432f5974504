//! Interrupted recovery.

use std::path::Path;

use kvwarp_engine::convert::{Converted, Request, finish};

use super::support::converted::counted;
use super::{converted, fixture, request, stopped, text};

/// The same bits.
fn same(a: &Converted, b: &Converted) -> bool {
    let all = || a.staged.weights.iter().zip(b.staged.weights.iter());
    a.staged.config == b.staged.config
        && a.stages == b.stages
        && all().all(|(a, b)| a.name == b.name && a.bytes == b.bytes)
}

fn layers(state: &Path) -> std::path::PathBuf {
    state.with_added_extension("layers")
}

/// Wherever it is stopped, it comes to the same bits, and what layers had been finished is not computed again.
#[test]
fn interrupted_recovery_goes_on_after_its_last_layer() {
    const STEPS: usize = 12;
    for (name, refit, distil) in
        [("mistral", true, 0), ("qwen2", false, STEPS), ("llama3", true, STEPS)]
    {
        let (source, tokens) = (fixture(name), text(160));
        let wanted = Request { refit, distil, ..request(&tokens, 8, 32) };
        let folder = tempfile::tempdir().unwrap();
        let (whole, all) = counted(&source, &wanted, &folder.path().join("whole"), usize::MAX);
        let (whole, mut least) = (whole.unwrap(), all);
        for stop in (1..all).rev().step_by(7) {
            let state = folder.path().join(stop.to_string());
            let error = stopped(&source, &wanted, &state, stop).err().unwrap();
            assert!(error.to_string().contains("interrupted"), "{error}");
            let (done, steps) = counted(&source, &wanted, &state, usize::MAX);
            assert!(same(&done.unwrap(), &whole), "{name}: stopped after {stop} of {all} steps");
            least = least.min(steps);
            finish(&state).unwrap();
            assert!(!state.exists() && !layers(&state).exists());
        }
        // Stopped at its end it has all layers: neither searched, nor fitted, nor trained.
        let trained = source.config.layers * distil.max(1);
        assert!(
            least + trained < all,
            "{name}: {least} of {all} steps after the last interruption"
        );
    }
}

/// Layers are those of the recovery that finished them.
#[test]
fn layers_of_another_recovery_are_not_taken() {
    let (source, tokens) = (fixture("llama3"), text(160));
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let of = |refit, distil| Request { refit, distil, ..request(&tokens, 8, 32) };
    let [fitted, trained] = [of(true, 0), of(true, 20)];
    for wanted in [&fitted, &trained, &of(false, 20), &of(true, 21)] {
        let done = stopped(&source, wanted, &state, usize::MAX).unwrap();
        assert!(same(&done, &converted(&source, wanted)), "{wanted:?}");
    }
    let longer = Request { window: 48, ..fitted };
    let error = stopped(&source, &longer, &state, usize::MAX).err().unwrap().to_string();
    assert!(error.contains("`window` is that of another conversion"), "{error}");
    for entry in std::fs::read_dir(layers(&state)).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    }
    let error = stopped(&source, &trained, &state, usize::MAX).err().unwrap().to_string();
    assert!(error.contains("refit-") && error.contains("remove it to begin again"), "{error}");
}
