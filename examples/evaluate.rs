//! Measures generated videos against real ones: `cargo run --release --example evaluate -- REAL GENERATED`
use anyhow::{Result, anyhow};
use lvdm::evaluation::{VideoPaths, evaluate};
use lvdm::{distributed::Ranks, torch::DeviceName};

fn main() -> Result<()> {
    lvdm::init();
    let [_, real, generated] =
        <[_; 3]>::try_from(std::env::args().collect::<Vec<_>>()).map_err(|_| anyhow!("REAL GENERATED"))?;
    let paths = VideoPaths { real: real.into(), generated: generated.into(), ..VideoPaths::default() };
    let evaluation = evaluate(&paths.experiment()?, DeviceName::Auto.open()?, &Ranks::alone())?;
    println!("{}\n{:#?}", evaluation.protocol_text, evaluation.figures["samples"].estimates);
    Ok(())
}
