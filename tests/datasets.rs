//! Data sets as they are found: every layout, with broken files among them, prepared, looked at and trained on.

#![cfg(all(feature = "video", feature = "opencv"))]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use common::{moving_clips, run_in, succeed_in};
use lvdm::data::{
    index::{IndexEntry, read_index},
    pictures::write_png,
    prepare::{Problem, ProblemKind, problems_file},
    write_video,
};

fn video(path: &Path, frames: i64) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_video(path, &moving_clips(1, frames, 32).get(0), 25.0).unwrap();
}

fn pictures(folder: &Path, frames: i64) {
    fs::create_dir_all(folder).unwrap();
    let clip = moving_clips(1, frames, 32).get(0);
    for f in 0..frames {
        write_png(&folder.join(format!("frame{f}.png")), &clip.select(1, f).permute([1, 2, 0]).contiguous()).unwrap();
    }
}

fn problems(index: &Path) -> BTreeMap<String, ProblemKind> {
    let text = fs::read_to_string(problems_file(index)).unwrap();
    let of = |line: &str| serde_json::from_str::<Problem>(line).unwrap();
    text.lines().map(of).map(|problem| (name(Path::new(&problem.name)), problem.kind)).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

fn splits(entries: &[IndexEntry]) -> BTreeMap<String, String> {
    entries.iter().map(|entry| (name(&entry.path), entry.split.clone().unwrap_or_default())).collect()
}

/// A tiny autoencoder trained on an index for one step.
fn train(at: &Path, index: &str, split: &str) {
    let text = format!(
        "data: {{dataset: {{kind: indexed, file: {index}, split: {split}}}, frames: 4, resolution: 16, workers: 1}}\n\
         autoencoder: {{channels: 4, factors: [2, 4, 4], norm_groups: 4}}\n\
         loss: {{perceptual_weight: 0.0, adversarial_weight: 0.0}}\n\
         optimizer: {{kind: adam, learning_rate: 1.0e-3}}\n\
         trainer: {{steps: 1, batch: 2, device: cpu, log_every: 1, checkpoint_every: 1}}\n"
    );
    fs::write(at.join("train.yaml"), text).unwrap();
    succeed_in(at, &["train", "autoencoder", "train.yaml"]);
}

const UCF: [&str; 5] = [
    "v_ApplyEyeMakeup_g01_c01",
    "v_ApplyEyeMakeup_g01_c02",
    "v_YoYo_g08_c01",
    "v_YoYo_g08_c03",
    "v_HandStandPushups_g02_c01",
];

/// UCF-101 flat, by class, below train/ and test/, and as frames; with and without the published lists.
#[test]
fn ucf101_in_every_layout() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    let class = |name: &str| name.split('_').nth(1).unwrap().to_string();
    type PathOf<'a> = Box<dyn Fn(usize, &str) -> PathBuf + 'a>;
    let layouts: [(&str, PathOf); 5] = [
        ("flat", Box::new(|_, name| at.join("flat").join(format!("{name}.avi")))),
        ("classes", Box::new(|_, name| at.join("classes").join(class(name)).join(format!("{name}.avi")))),
        ("split", {
            Box::new(|i, name| {
                let split = if i % 2 == 0 { "train" } else { "test" };
                at.join("split").join(split).join(class(name)).join(format!("{name}.avi"))
            })
        }),
        ("frames", Box::new(|_, name| at.join("frames").join(class(name)).join(name))),
        // as scripts name them that take a file's name for its folder of frames
        ("avi_frames", Box::new(|_, name| at.join("avi_frames").join(class(name)).join(format!("{name}.avi")))),
    ];
    for (layout, path_of) in &layouts {
        for (i, name) in UCF.iter().enumerate() {
            let path = path_of(i, name);
            match *layout {
                "frames" | "avi_frames" => pictures(&path, 20),
                _ => {
                    // an mp4 under the name of an avi: the reader looks at what is in the file
                    video(&path.with_extension("mp4"), 20);
                    fs::rename(path.with_extension("mp4"), &path).unwrap();
                }
            }
        }
        let out = succeed_in(at, &["data", "prepare", "ucf101", layout]).out;
        assert!(out.contains("5 videos, published are 13320") && out.contains("3 classes, published are 101"), "{out}");
        let index = at.join(layout).join("index.jsonl");
        let entries = read_index(&index).unwrap();
        assert_eq!(entries.len(), 5, "{layout}");
        for entry in &entries {
            assert_eq!((entry.frames, entry.width, entry.height), (20, 32, 32), "{layout}");
            assert_eq!(entry.fps.is_some(), !layout.ends_with("frames"), "{layout}");
            assert!(UCF.iter().any(|name| class(name) == *entry.class.as_ref().unwrap()), "{layout}");
        }
        // of the clips of a group the second is not there
        assert_eq!(
            problems(&index),
            BTreeMap::from([("v_YoYo_g08_c02".to_string(), ProblemKind::Missing)]),
            "{layout}"
        );
        let train_videos = splits(&entries).values().filter(|split| *split == "train").count();
        assert_eq!(train_videos, if *layout == "split" { 3 } else { 0 }, "{layout}");
    }

    // the published lists say the split, and which videos are missing
    let lists = at.join("classes/ucfTrainTestlist");
    fs::create_dir(&lists).unwrap();
    fs::write(lists.join("classInd.txt"), "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n").unwrap();
    let train_list = "YoYo/v_YoYo_g08_c01.avi 3\r\nYoYo/v_YoYo_g08_c03.avi 3\r\nHandstandPushups/v_HandStandPushups_g02_c01.avi 2\r\n";
    fs::write(lists.join("trainlist01.txt"), train_list).unwrap();
    let test_list = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c03.avi\n";
    fs::write(lists.join("testlist01.txt"), test_list).unwrap();
    // broken files among them
    fs::write(at.join("classes/YoYo/v_YoYo_g08_c01.avi"), []).unwrap();
    video(&at.join("classes/YoYo/v_YoYo_g08_c03.mp4"), 3);
    fs::remove_file(at.join("classes/YoYo/v_YoYo_g08_c03.avi")).unwrap();
    let said = succeed_in(at, &["data", "prepare", "ucf101", "classes", "--out", "indices/ucf.jsonl", "--frames", "4"]);
    let index = at.join("indices/ucf.jsonl");
    let entries = read_index(&index).unwrap();
    assert_eq!(
        splits(&entries),
        [
            ("v_ApplyEyeMakeup_g01_c01.avi", "test"),
            ("v_ApplyEyeMakeup_g01_c02.avi", "test"),
            ("v_HandStandPushups_g02_c01.avi", "train"),
            ("v_YoYo_g08_c03.mp4", "train"),
        ]
        .map(|(name, split)| (name.to_string(), split.to_string()))
        .into()
    );
    assert!(entries.iter().any(|entry| entry.class.as_deref() == Some("HandstandPushups")));
    assert_eq!(
        problems(&index),
        [
            ("v_ApplyEyeMakeup_g01_c03", ProblemKind::Missing),
            ("v_YoYo_g08_c01.avi", ProblemKind::Corrupt),
            ("v_YoYo_g08_c03.mp4", ProblemKind::TooShort),
        ]
        .map(|(name, kind)| (name.to_string(), kind))
        .into()
    );
    assert!(said.out.contains("published are 9537") && said.out.contains("1 corrupt"), "{}", said.out);
    train(at, "indices/ucf.jsonl", "train");
    // the same lists from elsewhere
    fs::rename(&lists, at.join("lists")).unwrap();
    succeed_in(at, &["data", "prepare", "ucf101", "classes", "--lists", "lists", "--out", "indices/again.jsonl"]);
    assert_eq!(splits(&read_index(&at.join("indices/again.jsonl")).unwrap()), splits(&entries));
    assert!(
        run_in(at, &["data", "prepare", "ucf101", "classes", "--lists", "nowhere"]).error(2).contains("trainlist01")
    );
    let said = run_in(at, &["data", "prepare", "taichi", "classes", "--lists", "lists"]);
    assert!(said.error(2).contains("taichi has no lists of splits"), "{}", said.err);
}

/// Tai chi as its own script leaves it by default: folders of pictures whose names end in .mp4. A sky laid out likewise.
#[test]
fn a_folder_that_is_named_like_a_file_is_a_folder() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    for (set, root) in [("taichi", "taichi-png"), ("sky-timelapse", "sky")] {
        for folder in ["train/a#000164#000351.mp4", "test/b#000001#000021.mp4"] {
            pictures(&at.join(root).join(folder), 20);
        }
        succeed_in(at, &["data", "prepare", set, root, "--frame-stride", "1"]);
        let index = at.join(root).join("index.jsonl");
        let entries = read_index(&index).unwrap();
        assert!(entries.iter().all(|entry| (entry.frames, entry.fps) == (20, None)), "{entries:?}");
        let right = [("a#000164#000351.mp4", "train"), ("b#000001#000021.mp4", "test")];
        assert_eq!(splits(&entries), right.map(|(n, s)| (n.into(), s.into())).into());
        assert!(problems(&index).is_empty());
    }
    train(at, "taichi-png/index.jsonl", "test");
}

/// What lies beside the frames of a folder is named, and no frame; so is a name that an index cannot hold.
#[test]
fn stray_pictures_and_odd_names_are_named() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    for folder in ["sky/a", "sky/b"] {
        pictures(&at.join(folder), 9);
    }
    for stray in ["thumb.png", "frame3_mask.png"] {
        fs::copy(at.join("sky/a/frame0.png"), at.join("sky/a").join(stray)).unwrap();
    }
    let named = at.join("sky").join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    fs::rename(at.join("sky/b"), &named).unwrap();
    let said = succeed_in(at, &["data", "prepare", "sky-timelapse", "sky", "--frames", "4"]);
    let index = at.join("sky/index.jsonl");
    let entries = read_index(&index).unwrap();
    assert_eq!(entries.iter().map(|entry| (name(&entry.path), entry.frames)).collect::<Vec<_>>(), [("a".into(), 9)]);
    let right = [("a", ProblemKind::Uneven), ("caf\u{fffd}", ProblemKind::Corrupt)];
    assert_eq!(problems(&index), right.map(|(n, k)| (n.into(), k)).into());
    for word in ["frame3_mask.png, thumb.png", "UTF-8"] {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }
    // read as they are found, the strays are told of once, and a clip of all of them is too long
    let pack = |frames: &str| {
        let size = ["--frames", frames, "--resolution", "16", "--out", "x.safetensors"];
        run_in(at, &[&["data", "pack", "--videos", "sky", "--frames-folders"][..], &size].concat())
    };
    let said = pack("9");
    assert!(said.out.contains("2 clips") && said.err.matches("thumb.png").count() == 1, "{}{}", said.out, said.err);
    let said = pack("10");
    assert!(said.error(1).contains("too short") || said.err.contains("no usable video"), "{}", said.err);
}

/// Skies with one and with two levels of folders.
#[test]
fn sky_timelapse_in_every_layout() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    for (layout, folders) in [
        ("two", ["sky_train/a/a_1", "sky_train/a/a_2", "sky_test/b/b_1"]),
        ("one", ["sky_train/a_1", "sky_train/a_2", "sky_test/b_1"]),
    ] {
        for folder in folders {
            pictures(&at.join(layout).join(folder), 6);
        }
        fs::write(at.join(layout).join("sky_test/b_1.txt"), "a note").unwrap();
        let said = succeed_in(at, &["data", "prepare", "sky-timelapse", layout, "--frames", "6"]);
        let entries = read_index(&at.join(layout).join("index.jsonl")).unwrap();
        assert_eq!(
            splits(&entries),
            [("a_1", "train"), ("a_2", "train"), ("b_1", "test")].map(|(n, s)| (n.into(), s.into())).into()
        );
        assert!(said.out.contains("2 videos of the split `train`") && said.out.contains("0 corrupt"), "{}", said.out);
    }
    // one split alone; a picture that is damaged, a folder that is too short
    fs::write(at.join("two/sky_train/a/a_1/frame5.png"), "no picture").unwrap();
    pictures(&at.join("two/sky_train/a/a_3"), 2);
    succeed_in(at, &["data", "prepare", "sky-timelapse", "two/sky_train", "--frames", "6"]);
    let index = at.join("two/sky_train/index.jsonl");
    let entries = read_index(&index).unwrap();
    assert_eq!(splits(&entries), [("a_2", "train"), ("a_3", "train")].map(|(n, s)| (n.into(), s.into())).into());
    assert_eq!(
        problems(&index),
        [("a_1", ProblemKind::Corrupt), ("a_3", ProblemKind::TooShort)].map(|(n, k)| (n.into(), k)).into()
    );
    train(at, "two/sky_train/index.jsonl", "train");
}

/// Tai chi, and what `inspect` shows of it.
#[test]
fn taichi_and_what_inspect_shows() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    for (path, frames) in [("train/a#1#70.mp4", 70), ("train/b#1#20.mp4", 20), ("test/c#5#75.mp4", 70)] {
        video(&at.join("taichi").join(path), frames);
    }
    fs::write(at.join("taichi/train/d.mp4"), [9; 3000]).unwrap();
    // 16 frames at stride 4 are 61
    let said = succeed_in(at, &["data", "prepare", "taichi", "taichi"]);
    assert!(said.out.contains("1 too short for 16 frames at stride 4"), "{}", said.out);
    assert!(said.out.contains("4 videos, published are 3081 to 3103"), "{}", said.out);
    let index = at.join("taichi/index.jsonl");
    assert_eq!(
        problems(&index),
        [("b#1#20.mp4", ProblemKind::TooShort), ("d.mp4", ProblemKind::Corrupt)].map(|(n, k)| (n.into(), k)).into()
    );
    train(at, "taichi/index.jsonl", "test");

    let said = succeed_in(at, &["data", "inspect", "taichi/index.jsonl", "--resolution", "24"]);
    println!("{}", said.out);
    for word in ["train", "test", "20 / 70 / 70", "32x32 25.00 fps (2)"] {
        assert!(said.out.contains(word), "`{word}` is not in\n{}", said.out);
    }
    let sheet = fs::File::open(at.join("contact-sheet.png")).unwrap();
    let info = png::Decoder::new(std::io::BufReader::new(sheet)).read_info().unwrap();
    assert_eq!((info.info().width, info.info().height), (8 * 26 - 2, 3 * 26 - 2));
    run_in(at, &["data", "inspect", "taichi/index.jsonl", "--split", "no"]).error(2);
    run_in(at, &["data", "inspect", "nowhere.jsonl"]).error(2);
}

/// Damage that neither the first nor the last frame shows, numbers that are left out, a picture of another size; and
/// an index whose videos broke later is shown all the same.
#[test]
fn what_is_wrong_in_the_middle_is_found() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    for folder in ["whole", "broken", "cut", "gap", "sizes"] {
        pictures(&at.join("sky").join(folder), 9);
    }
    let frame = |folder: &str, f: i64| at.join("sky").join(folder).join(format!("frame{f}.png"));
    fs::write(frame("broken", 5), "no picture").unwrap();
    let bytes = fs::read(frame("cut", 5)).unwrap();
    fs::write(frame("cut", 5), &bytes[..bytes.len() / 2]).unwrap();
    fs::remove_file(frame("gap", 7)).unwrap();
    write_png(&frame("sizes", 4), &moving_clips(1, 1, 16).get(0).select(1, 0).permute([1, 2, 0]).contiguous()).unwrap();
    let index = at.join("sky/index.jsonl");
    let uneven = [("gap", ProblemKind::Uneven), ("sizes", ProblemKind::Uneven)];
    for (quick, corrupt) in [(true, &["broken"][..]), (false, &["broken", "cut"])] {
        let more: &[&str] = if quick { &["--quick"] } else { &[] };
        let said = succeed_in(at, &[&["data", "prepare", "sky-timelapse", "sky", "--frames", "4"], more].concat());
        let corrupt = corrupt.iter().map(|name| (*name, ProblemKind::Corrupt));
        assert_eq!(problems(&index), corrupt.chain(uneven).map(|(n, k)| (n.into(), k)).collect());
        assert_eq!(said.out.contains("every frame of every video was decoded"), !quick, "{}", said.out);
        assert!(said.out.contains("from frame6.png to frame8.png there is a gap"), "{}", said.out);
        assert!(said.out.contains("frame4.png is 16x16, the first picture 32x32"), "{}", said.out);
    }

    fs::remove_dir_all(at.join("sky/sizes")).unwrap();
    let said = succeed_in(at, &["data", "inspect", "sky/index.jsonl", "--resolution", "16"]);
    assert!(
        said.out.contains("sizes: left grey") && said.err.contains("1 of the 3 videos"),
        "{}{}",
        said.out,
        said.err
    );
    assert!(at.join("contact-sheet.png").exists());
    assert!(
        fs::read_dir(at.join("sky")).unwrap().all(|file| file.unwrap().path().extension().is_none_or(|e| e != "png"))
    );
}

/// What was found and what was expected.
#[test]
fn a_wrong_layout_says_what_was_found() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path();
    video(&at.join("videos/cats/tom.mp4"), 4);
    fs::write(at.join("videos/notes.txt"), "notes").unwrap();
    for (set, wanted) in [("ucf101", "v_ApplyEyeMakeup_g01_c01.avi"), ("sky-timelapse", "sky_train/")] {
        let said = run_in(at, &["data", "prepare", set, "videos"]);
        let line = said.error(2);
        for word in [wanted, "1 folders (cats…)", "1 video files (cats/tom.mp4…)", "notes.txt"] {
            assert!(line.contains(word), "`{word}` is not in\n{line}");
        }
        assert!(!at.join("videos/index.jsonl").exists());
    }
    run_in(at, &["data", "prepare", "taichi", "nowhere"]).error(2);
    // nothing of what is there can be read
    fs::create_dir(at.join("broken")).unwrap();
    fs::write(at.join("broken/a.mp4"), [1; 999]).unwrap();
    assert!(run_in(at, &["data", "prepare", "taichi", "broken"]).error(1).contains("a.mp4"));
    let text = "data: {dataset: {kind: indexed, file: no.jsonl}, frames: 4, resolution: 16}\n\
                optimizer: {kind: adam, learning_rate: 1.0e-3}\ntrainer: {steps: 1, batch: 1}\n";
    fs::write(at.join("x.yaml"), text).unwrap();
    assert!(run_in(at, &["train", "autoencoder", "x.yaml"]).error(2).contains("lvdm data prepare"));
}
