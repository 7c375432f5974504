//! What a conversion costs a real model.

use std::fmt::Write as _;
use std::path::Path;

use kvwarp::linear::Activations;
use kvwarp_engine::convert::{Budget, Converted, Elements, Request, Stage, Target, convert, write};
use kvwarp_engine::model::Model;
use kvwarp_engine::perplexity::{Reading, score};
use kvwarp_engine::source::Source;

use super::support::models::{golden, texts};
use super::support::real_model;
use super::support::schedule::watched;

/// Those that are learnt from: a novel, documents and sources.
fn learnt(source: &Source) -> Vec<u32> {
    let text = ["eighty_days.txt", "calibration.txt", "gun.c"].map(golden).concat();
    source.tokenizer().unwrap().encode(&text, false).unwrap()
}

fn model(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap()
}

fn converted(source: &Source, request: &Request<'_>, beside: &Path) -> Converted {
    let mut note = |stage: &Stage| eprintln!("{}: {:.4}", stage.name, stage.nats);
    watched(|watch| convert((source, &model(source)), request, beside, watch, &mut note)).unwrap()
}

fn nats(source: &Source, tokens: &[u32]) -> f64 {
    let reading = Reading { cache: "f16".parse().unwrap(), prefix: 0, piece: 512 };
    watched(|watch| score(&model(source), tokens, &reading, watch)).unwrap().mean()
}

/// Half the cache, on few tokens: each step recovers some of what the one before it costs, the folder is the model, and
/// its tokens are those of the source.
#[test]
fn recovery_on_few_tokens() {
    let Some(path) = real_model() else { return };
    let (source, folder) = (Source::open(&path).unwrap(), tempfile::tempdir().unwrap());
    let (text, held) = (learnt(&source), texts());
    let request = Request {
        target: Target::Fixed(Budget { pairs: 16, rank: 96 }),
        whiten: true,
        refit: true,
        distil: 5,
        tokens: &text[..1024],
        searched: 128,
        window: 512,
        chosen_on: &[],
        held: &held["persuasion"][..256],
    };
    let state = folder.path().join("state");
    let done = converted(&source, &request, &state);
    std::fs::remove_file(&state).unwrap();
    let plain =
        Request { whiten: false, refit: false, distil: 0, tokens: &text[..128], ..request.clone() };
    let plain = converted(&source, &plain, &state).stages[2].nats;
    let [before, pairs, factors, refit, distil] = [0, 1, 2, 3, 4].map(|i| done.stages[i].nats);
    assert!(
        before < pairs && pairs < distil && distil < refit && refit < factors && factors < plain,
        "{:?} {plain}",
        done.stages
    );
    assert!(refit - before < 0.5 * (plain - before), "{:?} {plain}", done.stages);
    let to = folder.path().join("model");
    write(&source, &done.staged, Elements::F16, &to).unwrap();
    let read = Source::open(&to).unwrap();
    let far = nats(&read, request.held) - distil;
    assert!(far.abs() < 0.03, "8-bit activations apart: {far}");
    let (ours, theirs) = (source.tokenizer().unwrap(), read.tokenizer().unwrap());
    for text in [golden("gun.c"), "<|im_start|>user\n x  1234 é".into()] {
        for special in [false, true] {
            let ids = ours.encode(&text, special).unwrap();
            assert_eq!(ids, theirs.encode(&text, special).unwrap());
            assert_eq!(ours.decode(&ids, true), theirs.decode(&ids, true));
        }
    }
    assert_eq!((ours.bos(), ours.eos(), ours.ends()), (theirs.bos(), theirs.eos(), theirs.ends()));
    assert_eq!(ours.add_bos(), theirs.add_bos());
    let chat = |source: &Source, tokenizer| {
        let message = [kvwarp_engine::chat::Message::new("user", "hello")];
        source.chat(tokenizer).unwrap().unwrap().render(&message).unwrap()
    };
    assert_eq!(chat(&source, &ours), chat(&read, &theirs));
}

/// Tokens of each text that the record is measured on.
const MEASURED: usize = 2048;

/// Writes `benches/record/elitekv.csv`.
#[test]
#[ignore = "ten minutes: measures conversions of a real model"]
fn elitekv_record() {
    let Some(path) = real_model() else { return };
    let (source, folder) = (Source::open(&path).unwrap(), tempfile::tempdir().unwrap());
    let (text, held) = (learnt(&source), texts());
    let (chosen_on, text) = text.split_at(1024);
    let texts = ["persuasion", "policy"].map(|name| &held[name][..MEASURED]);
    let exact = texts.map(|tokens| nats(&source, tokens));
    let mut rows = "ratio,pairs,rank,method,text,log_perplexity,nats_over_source\n".to_owned();
    let mut row = |ratio: f64, budget: Budget, method: &str, nats: [f64; 2]| {
        for (i, name) in ["persuasion", "policy"].into_iter().enumerate() {
            let (Budget { pairs, rank }, more) = (budget, nats[i] - exact[i]);
            let line = format!("{ratio},{pairs},{rank},{method},{name},{:.4},{more:.4}", nats[i]);
            eprintln!("{line}");
            writeln!(rows, "{line}").unwrap();
        }
        nats.iter().sum::<f64>() - exact.iter().sum::<f64>()
    };
    row(1.0, Budget { pairs: 32, rank: 192 }, "source", exact);
    let full = Target::Fixed(Budget { pairs: 32, rank: 192 });
    for (ratio, mut target) in [(1.0, full), (0.5, Target::Ratio(0.5)), (0.25, Target::Ratio(0.25))]
    {
        let mut lost = Vec::new();
        for (method, whiten, refit) in
            [("refit", true, true), ("whitened", true, false), ("plain", false, false)]
        {
            // Weights alone: a text is only needed for the pairs.
            let tokens = if whiten { text } else { &text[..1024] };
            let request = Request {
                target,
                whiten,
                refit,
                distil: 0,
                tokens,
                searched: 1024,
                window: 1024,
                chosen_on,
                held: &texts[0][..256],
            };
            let state = folder.path().join(format!("{ratio}-{method}"));
            let done = converted(&source, &request, &state);
            target = Target::Fixed(done.budget);
            let nats = texts.map(|tokens| nats(&done.staged, tokens));
            lost.push(row(ratio, done.budget, method, nats));
            if ratio == 1.0 {
                break;
            }
        }
        match ratio {
            1.0 => assert!(lost[0].abs() < 0.01, "{lost:?}"),
            _ => assert!(lost[0] < 0.5 * lost[2], "{ratio}: {lost:?}"),
        }
    }
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/record/elitekv.csv");
    std::fs::write(to, rows).unwrap();
}
