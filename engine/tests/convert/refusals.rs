//! What no conversion can be of, and files that are not what they seem.

use std::path::Path;

use kvwarp_engine::convert::{Budget, ConvertError, Elements, Request, Target, finish, write};
use kvwarp_engine::source::Source;

use super::support::program::{failure, fixture as path, kvwarp, text as said};
use super::{converted, fixture, request, stopped, text};

fn refused(source: &Source, target: Target) -> String {
    let tokens = text(160);
    let request = Request { target, ..request(&tokens, 1, 1) };
    let folder = tempfile::tempdir().unwrap();
    match stopped(source, &request, &folder.path().join("state"), usize::MAX) {
        Err(ConvertError::Refused(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{target:?} was converted"),
    }
}

#[test]
fn budgets_that_no_model_has_are_refused() {
    let source = fixture("llama3");
    for (pairs, rank, part) in [
        (0, 16, "0 pairs; a head of this model has 1 to 32"),
        (33, 16, "33 pairs"),
        (32, 65, "rank 65; with 32 pairs this model has use for 1 to 64"),
        (8, 97, "has use for 1 to 96"),
        (8, 0, "rank 0"),
    ] {
        let why = refused(&source, Target::Fixed(Budget { pairs, rank }));
        assert!(why.contains(part), "{why}");
    }
    let why = refused(&source, Target::Ratio(0.1));
    assert!(why.contains("a ratio of 0.1") && why.contains("multiple of 16"), "{why}");
    let tokens = text(160);
    let shared = Request { by_layer: true, ..request(&tokens, 8, 40) };
    let folder = tempfile::tempdir().unwrap();
    let error = stopped(&source, &shared, &folder.path().join("state"), usize::MAX).err().unwrap();
    assert_eq!(error.to_string(), "rank 40; layers share out multiples of 16");
    let twice = converted(&source, &request(&tokens, 8, 32)).staged;
    assert!(refused(&twice, Target::Ratio(0.5)).contains("converted already"));
}

/// A folder with a converted model.
fn folder() -> tempfile::TempDir {
    let (source, tokens) = (fixture("llama3"), text(160));
    let folder = tempfile::tempdir().unwrap();
    let staged = converted(&source, &request(&tokens, 8, 32)).staged;
    write(&source, &staged, Elements::F32, &folder.path().join("model")).unwrap();
    folder
}

fn opened(folder: &Path) -> String {
    match Source::open(folder) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("opened"),
    }
}

#[test]
fn a_folder_is_refused_by_what_is_wrong_with_it() {
    let folder = folder();
    let to = folder.path().join("model");
    assert!(Source::open(&to).is_ok());
    let config = std::fs::read_to_string(to.join("config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&config).unwrap();
    let pairs = &json["elitekv"]["elite_pairs"];
    assert_eq!(pairs.as_array().unwrap().len(), 2);
    let edits: [(&str, serde_json::Value, &str); 9] = [
        ("/version", 2.into(), "`elitekv.version` is 2, expected 1"),
        ("/pairs", 0.into(), "`pairs` is 0, expected 1 to 32"),
        ("/pairs", 7.into(), "layer 0, head 0: 8 pairs, expected 7"),
        ("/ranks", vec![32].into(), "`elitekv` is of 1 layers; the model has 2"),
        ("/ranks/1", 0.into(), "a rank of 0"),
        ("/elite_pairs/1/0/7", 32.into(), "layer 1, head 0: pair 32, expected 0 to 31"),
        ("/elite_pairs/1/0/1", pairs[1][0][0].clone(), "not ascending without repetition"),
        ("/elite_pairs/0", Vec::<u8>::new().into(), "layer 0 has 0 kv heads, expected 1"),
        ("/source", "x".into(), "`kvwarp.elitekv` is "),
    ];
    for (at, value, part) in edits {
        let mut json = json.clone();
        *json["elitekv"].pointer_mut(at).unwrap() = value;
        std::fs::write(to.join("config.json"), json.to_string()).unwrap();
        let error = opened(&to);
        assert!(error.contains(part), "{at}: {error}");
    }
    let mut strange = json.clone();
    strange["elitekv"]["more"] = 1.into();
    std::fs::write(to.join("config.json"), strange.to_string()).unwrap();
    assert!(opened(&to).contains("unknown field `more`"));
    // Without the block the tensors are of no model.
    strange.as_object_mut().unwrap().remove("elitekv");
    std::fs::write(to.join("config.json"), strange.to_string()).unwrap();
    assert!(opened(&to).contains("k_proj"), "{}", opened(&to));
    std::fs::write(to.join("config.json"), config).unwrap();
    let tensors = to.join("model.safetensors");
    let bytes = std::fs::read(&tensors).unwrap();
    for n in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&tensors, &bytes[..n]).unwrap();
        let error = opened(&to);
        assert!(error.contains("model.safetensors"), "{n}: {error}");
    }
}

#[test]
fn a_gpu_refuses_by_name() {
    use kvwarp_engine::gpu::{Options, fit};
    let (source, tokens) = (fixture("llama3"), text(160));
    let staged = converted(&source, &request(&tokens, 6, 32)).staged;
    let fits = |source, spec: &str| {
        let fit = fit(source, &spec.parse().unwrap(), None, &Options::new(1, 64), 1 << 30);
        fit.map(|fit| fit.sequences).map_err(|error| error.to_string())
    };
    for (source, part) in [
        (&source, "no latents; `kvwarp convert elitekv` makes one"),
        (&staged, "`elitekv.pairs` is 6, with 1 kv heads"),
    ] {
        let error = fits(source, "latent").unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    // Expanded, any pairs and rank go.
    assert!(fits(&staged, "f16").unwrap() > 1);
}

/// It goes on from where it stopped, and only with what it was.
#[test]
fn an_interrupted_conversion_goes_on_and_one_of_something_else_does_not() {
    let (source, tokens) = (fixture("mistral"), text(160));
    let wanted = Request { by_layer: true, ..request(&tokens, 8, 48) };
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let whole = converted(&source, &wanted);
    let mut stops = 0;
    // Ever later; what is known stays.
    let done = loop {
        stops += 1;
        match stopped(&source, &wanted, &state, 3 * stops) {
            Ok(done) => break done,
            Err(error) => assert!(error.to_string().contains("interrupted"), "{error}"),
        }
    };
    assert!(stops > 5, "{stops}");
    assert_eq!(done.staged.config, whole.staged.config);
    for tensor in whole.staged.weights.iter() {
        assert!(done.staged.weights.get(tensor.name).unwrap().bytes == tensor.bytes);
    }
    let text = std::fs::read_to_string(&state).unwrap();
    for (from, to, part) in [
        ("\"version\":1", "\"version\":2", "`version` is that of another conversion"),
        ("\"window\":64", "\"window\":65", "`window` is that of another conversion"),
        ("\"whitened\":true", "\"whitened\":false", "`whitened` is"),
        ("\"model\":\"", "\"model\":\"0", "`model` is"),
        ("\"text\":\"", "\"text\":\"0", "`text` is"),
        ("{\"of\"", "{\"off\"", "unknown field"),
        ("{\"of\"", "", "expected value"),
        ("\"orders\":[[[", "\"orders\":[[[99,", "`orders` of layer 0 are no orders of pairs"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&state, text.replacen(from, to, 1)).unwrap();
        let error = stopped(&source, &wanted, &state, usize::MAX).err().unwrap().to_string();
        assert!(
            error.contains(part) && error.contains("state") && error.contains("remove it"),
            "{error}"
        );
    }
    finish(&state).unwrap();
    assert!(!state.exists() && finish(&state).is_ok());
}

#[test]
fn the_program_refuses_what_is_asked_wrongly() {
    let (folder, model) = (tempfile::tempdir().unwrap(), path("llama3"));
    let there = folder.path().display().to_string();
    let calib = folder.path().join("text");
    std::fs::write(&calib, "x").unwrap();
    let calib = calib.display().to_string();
    let begin = ["convert", "elitekv", "-m", &model, "--calib", &calib];
    let new = format!("{there}/new");
    for (more, code, part) in [
        (&["-o", &there][..], 2, "exists: remove it, or name another -o"),
        (&["-o", &new, "--ratio", "0"], 2, "--ratio is 0"),
        (&["-o", &new, "-c", "1k"], 2, "-c is 1024; the model reads 1 to 512 at once"),
        (&["-o", &new, "-c", "128"], 1, "tokenizer.json"),
    ] {
        let (exit, error) = failure(&[&begin[..], more].concat());
        assert!(exit == code && error.contains(part), "{more:?}: {exit} {error}");
    }
    let both = kvwarp(&[&begin[..], &["-o", &new, "--pairs", "4"]].concat());
    assert!(said(&both.stderr).contains("--rank"), "{}", said(&both.stderr));
}
