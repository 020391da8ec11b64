//! Samples one video of a run: `cargo run --release --example sample -- RUN VIDEO.mp4`
use std::{env, path::Path};

use anyhow::{Result, anyhow};
use lvdm::{data::write_video, models, models::SampleId, torch::DeviceName};

fn main() -> Result<()> {
    lvdm::init();
    let [_, run, video] = <[_; 3]>::try_from(env::args().collect::<Vec<_>>()).map_err(|_| anyhow!("RUN VIDEO.mp4"))?;
    let model = models::open(Path::new(&run), DeviceName::Auto.open()?)?;
    let samples = [SampleId { seed: 0, sample: 0 }];
    let clips = model.videos(&samples, &Default::default(), &mut |_, _| {})?; // [1, 3, F, H, W]
    write_video(Path::new(&video), &clips.get(0), 8.0)
}
