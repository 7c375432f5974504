//! The program `kvwarp`.

fn main() -> std::process::ExitCode {
    kvwarp_engine::cli::main()
}
