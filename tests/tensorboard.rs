//! The event files, read back: record by record here, and by TensorBoard's own reader in Python.

use std::{fs, path::Path, process::Command};

use lvdm::{run_files::TENSORBOARD_FOLDER, train::logger::RunLogger};
use protobuf::Message;
use serde_json::Value;
use tensorboard_proto::event::Event;

/// A moving picture of three frames.
fn gif_bytes(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = gif::Encoder::new(&mut bytes, width, height, &[]).unwrap();
    encoder.set_repeat(gif::Repeat::Infinite).unwrap();
    for frame in 0..3u8 {
        let pixels: Vec<u8> =
            (0..width as usize * height as usize).flat_map(|i| [i as u8, 80 * frame, 255 - i as u8]).collect();
        encoder.write_frame(&gif::Frame::from_rgb(width, height, &pixels)).unwrap();
    }
    drop(encoder);
    bytes
}

fn png_bytes(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let pixels: Vec<u8> = (0..width * height * 3).map(|i| i as u8).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    bytes
}

/// A run that went to step 6, fell back to its checkpoint of step 4 and then went on to step 8.
fn write_run(run: &Path) -> (Vec<u8>, Vec<u8>) {
    let (png, gif) = (png_bytes(24, 8), gif_bytes(12, 10));
    let mut logger = RunLogger::open(run, None).unwrap();
    for step in 1..=6 {
        logger.scalars(step, &[("loss/total", 100.0 + step as f64), ("gradient_norm", f64::NAN)]);
    }
    logger.image_png(4, "reconstruction", &png, 24, 8).unwrap();
    drop(logger);
    let mut logger = RunLogger::open(run, Some(4)).unwrap();
    for step in 5..=8 {
        logger.scalars(step, &[("loss/total", step as f64)]);
    }
    logger.gif(8, "samples", &gif, 12, 10).unwrap();
    logger.finish();
    (png, gif)
}

/// CRC-32C, bit by bit, masked as the record format asks.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= byte as u32;
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The events of all files of a folder, in the order of their names.
fn events(folder: &Path) -> Vec<Event> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut events = Vec::new();
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(rest[8..12].try_into().unwrap()), masked_crc(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap()), masked_crc(data));
            events.push(Event::parse_from_bytes(data).unwrap());
            rest = &rest[16 + length..];
        }
    }
    events
}

#[test]
fn every_record_of_an_event_file_is_whole() {
    assert_eq!(masked_crc(b"123456789").wrapping_sub(0xa282_ead8).rotate_left(15), 0xe306_9283);
    let run = tempfile::tempdir().unwrap();
    let (png, gif) = write_run(run.path());
    let events = events(&run.path().join(TENSORBOARD_FOLDER));

    assert_eq!(events.iter().filter(|event| event.get_file_version() == "brain.Event:2").count(), 2);
    let starts: Vec<i64> =
        events.iter().filter(|event| event.has_session_log()).map(|event| event.get_step()).collect();
    assert_eq!(starts, [0, 5]);
    let values =
        || events.iter().flat_map(|event| event.get_summary().get_value().iter().map(|v| (event.get_step(), v)));
    let losses: Vec<(i64, f32)> =
        values().filter(|(_, v)| v.get_tag() == "loss/total").map(|(step, v)| (step, v.get_simple_value())).collect();
    assert_eq!(losses.len(), 10);
    assert_eq!((losses[0], losses[9]), ((1, 101.0), (8, 8.0)));
    for (tag, step, width, height, bytes) in [("reconstruction", 4, 24, 8, &png), ("samples", 8, 12, 10, &gif)] {
        let (at, value) = values().find(|(_, v)| v.get_tag() == tag).unwrap();
        let image = value.get_image();
        assert_eq!((at, image.get_width(), image.get_height()), (step, width, height));
        assert_eq!(image.get_encoded_image_string(), &bytes[..]);
    }
    assert!(events.iter().all(|event| event.get_wall_time() > 1e9));
}

#[test]
fn tensorboard_reads_the_events() {
    let run = tempfile::tempdir().unwrap();
    let (png, gif) = write_run(run.path());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(root.join("tests/read_events.py"))
        .arg(run.path().join(TENSORBOARD_FOLDER))
        .env("PYTHONPATH", root.join(".python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("Python 3 is needed: apt-get install python3");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "TensorBoard's reader (`make setup` installs it into .python) says:\n{complaint}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();

    // steps 5 and 6 of the first start are forgotten
    let losses: Vec<(i64, f64)> = serde_json::from_value(found["scalars"]["loss/total"].clone()).unwrap();
    let expected: Vec<(i64, f64)> =
        (1..=8).map(|step| (step, if step <= 4 { 100.0 + step as f64 } else { step as f64 })).collect();
    assert_eq!(losses, expected);
    assert_eq!(found["scalars"]["gradient_norm"], serde_json::json!([[1, null], [2, null], [3, null], [4, null]]));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(found["images"]["reconstruction"], serde_json::json!([[4, 24, 8, hex(&png)]]));
    assert_eq!(found["images"]["samples"], serde_json::json!([[8, 12, 10, hex(&gif)]]));
}
