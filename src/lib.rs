//! Latent Video Diffusion Models (He et al. 2022, arXiv 2211.13221) on LibTorch.
//!
//! **Train:** video file → clip `[3, F, H, W]` u8 → x in [−1, 1] → `VideoAutoencoder::encode` → z_0 →
//! `NoisePath` → `Network` → loss → optimizer → checkpoint.
//! **Sample:** noise → `Sampler` × `Denoiser` → z_0 → decode → u8 video → mp4.
//! **Evaluate:** (generated | real) u8 video → the same `FeatureExtractor` → features → each `VideoMetric`, with its protocol.
//!
//! # Axes
//! B batch, C channels, F frames, H and W height and width of pictures, h and w those of latents.
//! A video is `[B, C, F, H, W]`. `t` is always diffusion time, never a frame.
//!
//! # Floors
//! A module imports from lower floors only; `tests/architecture` reads this list and holds the code to it.
//!
//! ```text
//! commands                                one verb, one file
//! report | bench | doctor | verify        pages of finished runs; how fast the parts are; what a machine has; reference cases
//! evaluation | plan                       generated clips against real ones under a protocol; baselines; cards; long videos; what a training needs
//! train                                   the one loop, its two tasks, the log of a run
//! exchange                                released checkpoints ↔ runs
//! models                                  families of models: a trained run → videos
//! run                                     what a run carries: averaged weights, latent space, text encoder
//! experiment | checkpoint                 what a YAML says: typed, strict; what a run keeps
//! metrics | diffusion | autoencoder_loss  FVD, KVD and their like; noise paths, denoiser, sampler; LPIPS and GAN losses
//! flops | autoregression                  operations of a forward pass; codes one after the other
//! networks | codecs | extractors | text   denoisers and the transformer over codes; clips ↔ latents; frozen judges; captions → tokens → states
//! data                                    files → clips
//! weights                                 foreign weights → our names
//! nn                                      layers and their parameters
//! distributed                             several processes that do one piece of work
//! torch | ffmpeg | random | safetensors   what tch and video-rs do not expose (the only `unsafe`); noise; tensor files
//! atomic_file | file_format | text_file   files that are whole or not there; what a file is; texts that people wrote
//! registry | run_files                    implementations by the `kind` that a file of settings names; names of a run's files
//! ```
//!
//! Pixels never enter `diffusion`; latents never enter `data`; samplers know nothing of masks and
//! guidance; `metrics` knows nothing of diffusion, and neither it nor `train` knows the other.

#![warn(missing_docs, clippy::missing_errors_doc)]
// both panic where nobody reads: see `say!` in src/commands and `tell` in src/train/progress.rs
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]
#![deny(unsafe_code)]

pub mod atomic_file;
pub mod autoencoder_loss;
pub mod autoregression;
pub mod bench;
pub mod checkpoint;
pub mod codecs;
pub mod commands;
pub mod data;
pub mod diffusion;
pub mod distributed;
pub mod doctor;
pub mod evaluation;
pub mod exchange;
pub mod experiment;
pub mod extractors;
#[cfg(feature = "video")]
#[allow(unsafe_code)]
pub mod ffmpeg;
pub mod file_format;
pub mod flops;
pub mod metrics;
pub mod models;
pub mod networks;
pub mod nn;
pub mod plan;
pub mod random;
pub mod registry;
pub mod report;
pub mod run;
pub mod run_files;
pub mod safetensors;
pub mod text;
pub mod text_file;
#[allow(unsafe_code)]
pub mod torch;
pub mod train;
pub mod verify;
pub mod weights;

/// What a program calls before anything else: LibTorch finds its CUDA half, products in float32 are exact, and as many
/// threads compute as this process has CPUs, which they give up while they wait. Without it there is no GPU.
pub fn init() {
    torch::give_way_while_waiting();
    torch::use_available_cpus();
    // before anything asks LibTorch about CUDA; `doctor` says why it failed
    let _ = torch::load_cuda();
    torch::compute_exactly();
}
