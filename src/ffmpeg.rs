//! What `video-rs` does not expose of FFmpeg, and all that needs `unsafe` there.

use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path, ptr};

use anyhow::{Context, Result};
use video_rs::ffmpeg::{Error, Packet, codec, ffi, filter, format, frame};

/// Opens a file for reading, whatever bytes its name is made of. A name like `http:x.mp4` is a file too.
///
/// # Errors
/// A file that is missing or that FFmpeg does not know.
pub fn open_input(path: &Path) -> Result<format::context::Input> {
    let mut name = b"file:".to_vec();
    name.extend(path.as_os_str().as_bytes());
    let name = CString::new(name).context("there is a NUL byte in its name")?;
    let mut input = ptr::null_mut();
    let done = |code: i32| if code < 0 { Err(Error::from(code)) } else { Ok(()) };
    // SAFETY: the name ends in NUL; what `avformat_open_input` fills in, `wrap` takes and will close.
    unsafe {
        done(ffi::avformat_open_input(&mut input, name.as_ptr(), ptr::null_mut(), ptr::null_mut()))?;
        let input = format::context::Input::wrap(input);
        done(ffi::avformat_find_stream_info(input.as_ptr().cast_mut(), ptr::null_mut()))?;
        Ok(input)
    }
}

/// How many packets of a stream the container's own list has so far. That of mp4 and mov files has them all once the file
/// is open, as their edit lists leave them.
pub fn listed_packets(stream: &format::stream::Stream) -> i64 {
    // SAFETY: the pointer is that of the stream, which is borrowed.
    unsafe { ffi::avformat_index_get_entries_count(stream.as_ptr()).into() }
}

/// Whether a packet is decoded because others need it and its frame is not to be shown, as edit lists say.
pub fn is_hidden(packet: &Packet) -> bool {
    use codec::packet::Ref;
    // SAFETY: the pointer is that of the packet, which is borrowed.
    unsafe { (*packet.as_ptr()).flags & ffi::AV_PKT_FLAG_DISCARD != 0 }
}

/// The numbers of the matrix and the range that a picture says of its colours. A file may say any number there, and the
/// enumerations of the binding may not hold it.
pub fn colours(frame: &frame::Video) -> [i32; 2] {
    // SAFETY: the pointer is that of the frame, which is borrowed; both fields are C enumerations, which are `int`s.
    unsafe {
        let frame = frame.as_ptr();
        [(&raw const (*frame).colorspace).cast::<i32>().read(), (&raw const (*frame).color_range).cast::<i32>().read()]
    }
}

/// A graph of filters that starts no threads: those that decode are busy already.
pub fn filter_graph() -> filter::Graph {
    let mut graph = filter::Graph::new();
    // SAFETY: the graph is new, and not used elsewhere.
    unsafe { (*graph.as_mut_ptr()).nb_threads = 1 };
    graph
}
