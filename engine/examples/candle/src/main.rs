//! Greedy text of a GGUF model: `kvwarp-candle MODEL.gguf [CACHE [TOKENS]] < prompt`.

use std::io::Read;
use std::path::Path;

use candle_core::{Device, Error, Result};
use kvwarp_candle::Llama;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, other| args.get(i).map_or(other, String::as_str);
    let (store, n) = (arg(1, "q2").parse()?, arg(2, "32").parse().map_err(Error::wrap)?);
    let device = if cfg!(feature = "cuda") { Device::new_cuda(0)? } else { Device::Cpu };
    let mut model = Llama::open(Path::new(arg(0, "model.gguf")), store, 8192, &device)?;

    let mut prompt = String::new();
    std::io::stdin().read_to_string(&mut prompt)?;
    let prompt = model.tokenizer.encode(prompt, false).map_err(Error::wrap)?;
    let said = model.greedy(prompt.get_ids(), n)?;
    println!("{}", model.tokenizer.decode(&said, true).map_err(Error::wrap)?);
    eprintln!("tokens {said:?}");
    eprintln!("{} tokens in {} bytes of cache", prompt.len() + n - 1, model.cache_bytes());
    Ok(())
}
