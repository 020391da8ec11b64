//! Names of CLIP in checkpoints that hold it whole.

/// Where original checkpoints of Stable Diffusion hold the text encoder.
pub(super) const TEXT_ENCODER: &str = "cond_stage_model.";

/// What CLIP has besides the text encoder's layers, wherever it stands: its half for images, and what compares the two.
const UNUSED_OF_CLIP: [&str; 4] = ["vision_model.", "visual_projection.", "text_projection", "logit_scale"];

/// Whether a tensor is CLIP's and none of its text encoder's layers, under whatever place.
pub fn is_unused_of_clip(name: &str) -> bool {
    let inner = [TEXT_ENCODER, "transformer.", "text_model."]
        .into_iter()
        .fold(name, |name, place| name.strip_prefix(place).unwrap_or(name));
    UNUSED_OF_CLIP.iter().any(|unused| inner.starts_with(unused))
}
