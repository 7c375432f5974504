//! What a conversion costs a real model.

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
pub fn learnt(source: &Source) -> Vec<u32> {
    let text = ["eighty_days.txt", "calibration.txt", "gun.c"].map(golden).concat();
    source.tokenizer().unwrap().encode(&text, false).unwrap()
}

fn model(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap()
}

pub fn converted(source: &Source, request: &Request<'_>, beside: &Path) -> Converted {
    let mut note = |stage: &Stage| eprintln!("{}: {:.4}", stage.name, stage.nats);
    watched(|watch| convert((source, &model(source)), request, beside, watch, &mut note)).unwrap()
}

pub fn nats(source: &Source, tokens: &[u32]) -> f64 {
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
        by_layer: false,
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
