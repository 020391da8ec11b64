//! How video files and folders of frames are read, as a number. Packed clips, latents and figures carry it, so that what
//! was made of other frames is not taken for the same.

use std::path::Path;

use super::walk::warn_once;

/// One more with every change that makes other frames of the same files. Files that carry no number are of 0, when every
/// video was read as BT.601 in the limited range, as it is stored and not as it is turned, and with the frames that edit
/// lists hide.
pub const READING: u32 = 1;

/// Says of a file that was made of videos that they were read in a former way; `again` is the command that makes it. What
/// was made of arrays has no reading.
pub fn warn_of_former_reading(file: &Path, reading: Option<u32>, command: &str) {
    if reading.is_some_and(|reading| reading < READING) {
        warn_once(format!(
            "{} was made when lvdm read every video as BT.601 in the limited range, unturned and with the frames that edit \
             lists hide: make it again with `{command}`, unless its videos are such",
            file.display()
        ));
    }
}
