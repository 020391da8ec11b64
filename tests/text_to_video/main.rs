//! From a Stable Diffusion to videos: import, training on captioned clips, sampling from prompts.

#[path = "../common/mod.rs"]
mod common;

mod imports;
mod memory;
mod sampling;
mod training;

use std::path::Path;

use common::text_runs::Tensors;
use lvdm::{
    checkpoint,
    models::{LatentConditions, TextPrompts},
};
use tch::Device;

const CPU: Device = Device::Cpu;

fn model_of(run: &Path) -> Tensors {
    checkpoint::open(run).unwrap().1.part("model")
}

fn text<'a>(prompts: &'a [String], guidance: f64) -> LatentConditions<'a> {
    LatentConditions { text: Some(TextPrompts { prompts, negative: "a dog", guidance }), ..LatentConditions::default() }
}
