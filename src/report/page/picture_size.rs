//! Widths and heights, which pictures and videos have in their first bytes.

/// Pictures of so few pixels are enlarged as squares.
pub(super) fn is_small(size: Option<(u32, u32)>) -> bool {
    size.is_some_and(|(width, height)| width.min(height) <= 300)
}

/// Width and height in the header of a PNG.
pub(super) fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    bytes.starts_with(b"\x89PNG").then(|| Some((side(16)?, side(20)?)))?
}

/// Width and height at the end of the first track header of an mp4, version 0, where they are 16.16 numbers.
pub(super) fn mp4_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let header = bytes.windows(5).position(|window| window == b"tkhd\0")?;
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) >> 16);
    Some((side(header + 80)?, side(header + 84)?)).filter(|(width, height)| *width > 0 && *height > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_from_headers() {
        let png = crate::data::pictures::png(&tch::Tensor::zeros([3, 5, 3], (tch::Kind::Uint8, tch::Device::Cpu)));
        assert_eq!(png_size(&png.unwrap()), Some((5, 3)));
        let mut track = b"....tkhd\0".to_vec();
        track.resize(4 + 80, 0);
        track.extend([0, 40, 0, 0, 0, 30, 0, 0]);
        assert_eq!(mp4_size(&track), Some((40, 30)));
        for cut in [&track[..20], &track[..86], b"", b"GIF89a"] {
            assert_eq!((mp4_size(cut), png_size(cut)), (None, None));
        }
    }
}
