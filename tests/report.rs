//! `lvdm report`: the page says what the files say, and works in a browser, on a phone, without a network.

mod common;

use std::{fs, path::Path};

use common::{browser::Browser, moving_clips, run_in, succeed_in};
use lvdm::data::{pictures, write_video};
use serde_json::{Value, json};
use tch::Tensor;

/// What wants to be run, in tags, attributes and the page's own script.
const HOSTILE: &str = "</script><script>window.hostile=1</script><img src=x onerror='window.hostile=1'>\"&'";

/// The file, and the folders above it.
fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A log of `lines` lines, with a term that falls by orders of magnitude, a gap, and one under a hostile name.
fn metrics(lines: i64, height: f64) -> String {
    let line = |i: i64| {
        let part = i as f64 / lines as f64;
        let loss = if i == lines / 2 { None } else { Some(height * (-8.0 * part).exp()) };
        let line = json!({"step": 10_000 / lines * (i + 1), "loss": loss, "learning_rate": 1e-3 * (1.0 - part),
            "clips_per_second": 4.0, "seconds_per_step": 0.5, "peak_memory_gb": if i % 9 == 0 { 2.5 } else { 1.0 }, HOSTILE: part, "skipped_steps": 0.0});
        format!("{line}\n")
    };
    (0..lines).map(line).collect()
}

fn experiment(learning_rate: &str, note: &str) -> String {
    format!(
        "seed: 0\nunet:\n  channels: 8\nobjective:\n  loss: l2\noptimizer:\n  learning_rate: {learning_rate}\n\
         note: {}\ntrainer:\n  batch: 2\n  accumulate: 1\n  log_every: 10\n",
        json!(note)
    )
}

fn protocol(name: &str) -> Value {
    json!({"settings": {"name": name}, "extractor": "I3D"})
}

/// As `lvdm evaluate` writes it, with several runs.
fn figures(fvd: f64, name: &str, hash: &str, text: &str) -> Value {
    json!({
        "figures": {
            "samples": {"fvd": fvd, "kvd": -1.25, "fvd_std": 3.5, "kvd_std": 0.5, "fvd_extrapolated": 99.5,
                "runs": [{"fvd": fvd - 3.5, "kvd": -1.75}, {"fvd": fvd + 3.5, "kvd": -0.75}],
                "fvd_interval": [fvd - 9.0, fvd + 9.0], "kvd_interval": [-2.0, 2.0], "clips": [16, 12]},
            "frozen": {"fvd": 700.0, "kvd": 60.0, "fvd_std": null, "kvd_std": null, "fvd_extrapolated": -255.89,
                "runs": [{"fvd": 700.0, "kvd": 60.0}], "fvd_interval": null, "kvd_interval": null, "clips": [16, 16]}
        },
        "generated_text": "weights of runs/first, step 30, UniPC 20 steps, bf16",
        "floor": {"fvd": 21.5, "kvd": 0.125, "clips": 16, "sets": "draws"},
        "psnr_db": 24.5, "protocol": protocol(name), "protocol_hash": hash, "protocol_text": text,
        "device": "cpu", "sample_seconds": 1.0, "evaluate_seconds": 1.0
    })
}

/// A folder as a job leaves it, and every text in it that can be is hostile.
fn runs(at: &Path) {
    let clips = moving_clips(3, 16, 32);
    for (run, lines, rate) in [("first", 40, "0.001"), ("second", 1000, "0.002")] {
        put(&at.join(run).join("metrics.jsonl"), &metrics(lines, 3.0));
        put(&at.join(run).join("experiment.yaml"), &experiment(rate, HOSTILE));
    }
    for i in 0..14 {
        write_video(&at.join(format!("evaluation/samples/{i:05}.mp4")), &clips.get(i % 3), 8.0).unwrap();
    }
    put(&at.join("evaluation/samples/00000.txt"), HOSTILE);
    put(&at.join("evaluation/figures.json"), &figures(123.456, "plain", "aaaa00000001", HOSTILE).to_string());
    put(&at.join("other/figures.json"), &figures(654.321, "stylegan-v-16", "bbbb00000002", "another").to_string());
    let sheet = pictures::grid(&Tensor::cat(&[&clips, &clips], 0), 4).unwrap();
    pictures::write_png(&at.join("evaluation/reconstructions.png"), &sheet).unwrap();
    let curve = |name: &str, fvd: f64| {
        let windows: Vec<Value> =
            (0..8).map(|i| json!({"fvd": fvd + 9.0 * f64::from(i), "kvd": f64::from(i % 3), "fvd_interval": [7.25, 888.5], "kvd_interval": null})).collect();
        json!({"name": name, "windows": windows, "motion": 5.5, "seam": null, "settings": {"note": HOSTILE}})
    };
    let long = json!({
        "curves": [curve("autoregressive", 300.0), curve(HOSTILE, 200.0)], "experiment": {"real": {"frames": 16}},
        "floor": {"fvd": 50.0, "kvd": 1.0}, "protocol": protocol("plain"), "protocol_hash": "aaaa00000001", "device": "cpu"
    });
    put(&at.join("long/figures.json"), &long.to_string());
    put(&at.join("long/curves.jsonl"), "");
    put(&at.join("long/autoregressive/metrics.jsonl"), "{\"step\":0,\"window_fvd\":300.0}\n");
    write_video(&at.join("long/autoregressive/00000.mp4"), &clips.get(0), 8.0).unwrap();
    put(&at.join("summary.json"), "{\"seconds\": {\"autoencoder\": 12.5}}");
}

/// Waits in the page until all videos have shown more than their first picture, each brought into view.
const PLAY: &str = "(async () => {
    const found = [];
    for (const video of document.querySelectorAll('video')) {
        video.scrollIntoView();
        const end = Date.now() + 20000;
        const start = video.currentTime;
        while ((video.currentTime === start || video.paused) && !video.error && Date.now() < end)
            await new Promise(done => setTimeout(done, 20));
        found.push({moved: video.currentTime !== start, width: video.videoWidth, error: video.error && video.error.message,
            muted: video.muted, loop: video.loop, inline: video.playsInline});
    }
    return found;
})()";

/// Every drawn curve, its box on the screen and how it is drawn.
const CURVES: &str =
    "[...document.querySelectorAll('svg path')].filter(path => path.querySelector('title')).map(path => {
    const {width, height} = path.getBoundingClientRect();
    return {name: path.textContent, width, height, stroke: path.getAttribute('stroke'),
        dash: path.getAttribute('stroke-dasharray'), line: path.getAttribute('fill') === 'none', points:
        path.getAttribute('d').split(/[ML]/).length - 1};
})";

/// What the page refers to, what it fetched, what of it ran, how wide it is.
const STATE: &str = "({
    references: [...document.querySelectorAll('*')].flatMap(element => [...element.attributes])
        .filter(a => ['src', 'href', 'srcset', 'poster', 'action', 'data', 'style', 'background'].includes(a.name)
            || a.name.startsWith('on')).map(a => a.name + '=' + a.value.slice(0, 20)),
    fetched: performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 40)),
    policy: document.querySelector('meta[http-equiv]').content, scripts: document.scripts.length,
    hostile: window.hostile === undefined, text: document.body.textContent,
    page: document.documentElement.scrollWidth, window: innerWidth,
    letters: Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)),
    wide: [...document.querySelectorAll('.wide, pre')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
    background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color
})";

/// What another script, another style and a request come to.
const BREAK_OUT: &str = "(async () => {
    const refused = [];
    document.addEventListener('securitypolicyviolation', event => refused.push(event.effectiveDirective));
    const add = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
    add('script', {textContent: 'window.hostile = 1'});
    add('style', {textContent: 'body { display: none }'});
    add('img', {src: 'http://127.0.0.1:9/x.png'});
    await fetch('http://127.0.0.1:9/').catch(() => 0);
    await new Promise(done => setTimeout(done, 100));
    return {refused: refused.sort().join(' '), hostile: window.hostile === undefined,
        shown: getComputedStyle(document.body).display};
})()";

#[test]
fn the_page_works_in_a_browser() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().canonicalize().unwrap();
    runs(&at.join("job <i>&amp;"));
    let said = succeed_in(&at, &["report", "job <i>&amp;", "--out", "page.html"]);
    assert!(said.out.contains("page.html"), "{}", said.out);
    let page = at.join("page.html");

    let mut browser = Browser::start(&at);
    for (width, dark) in [(360, false), (1280, false), (360, true)] {
        browser.open(&page, width, 740, dark);

        let videos = browser.value(PLAY);
        let videos = videos.as_array().unwrap();
        assert_eq!(videos.len(), 12 + 1, "at most twelve of a folder");
        for video in videos {
            let right = json!({"moved": true, "width": 32, "error": null, "muted": true, "loop": true, "inline": true});
            assert_eq!(*video, right, "{width} pixels");
        }
        let pausing = "document.getElementById('playing').click(); \
                       [...document.querySelectorAll('video')].every(video => video.paused)";
        assert_eq!(browser.value(pausing), true);

        let curves = browser.value(CURVES);
        let curves = curves.as_array().unwrap();
        for curve in curves {
            let [w, h] = ["width", "height"].map(|side| curve[side].as_f64().unwrap());
            assert!(w > 50.0 && h > 0.5, "{curve}");
            assert!(curve["points"].as_i64().unwrap() <= 121, "thinned: {curve}");
        }
        let lines: Vec<&Value> = curves.iter().filter(|curve| curve["line"] == true).collect();
        // loss, learning rate, the hostile metric and memory of two runs; FVD and KVD of two curves
        assert_eq!(lines.len(), 2 * 4 + 2 * 2, "{lines:?}");
        for two in lines.chunks(2) {
            assert!(two[0]["dash"] != two[1]["dash"] && two[0]["stroke"] != two[1]["stroke"], "{two:?}");
        }

        let state = browser.value(STATE);
        assert_eq!(state["window"], width);
        assert!(state["page"].as_i64().unwrap() <= width, "no sideways scrolling: {} of {width}", state["page"]);
        assert_eq!(state["wide"], 0, "wide tables scroll in their own boxes");
        assert!(state["letters"].as_f64().unwrap() > 9.0, "{}", state["letters"]);
        for reference in state["references"].as_array().unwrap() {
            let text = reference.as_str().unwrap();
            assert!(["src=data:", "href=#"].iter().any(|start| text.starts_with(start)), "{text}");
        }
        assert_eq!(state["fetched"], json!([]));
        let policy = state["policy"].as_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!((&state["scripts"], &state["hostile"]), (&json!(1), &json!(true)));
        assert_eq!(state["background"] == "rgb(255, 255, 255)", !dark, "{}", state["background"]);
        let text = state["text"].as_str().unwrap();
        for words in [
            "job <i>&amp;",
            &format!("00000.mp4: {HOSTILE}"),
            "The first 12 of 14 videos",
            // figures as the file has them, and what they depend on
            "123.46 ± 3.50",
            "[114.46, 132.46]",
            "−1.250 ± 0.500",
            "119.96 / −1.750",
            "at most 99.50",
            "weights of runs/first, step 30, UniPC 20 steps, bf16",
            "16 / 12",
            "real against real at 16 clips: FVD 21.50, KVD 0.125",
            "24.50 dB PSNR",
            "Protocol plain aaaa00000001",
            "Protocol stylegan-v-16 bbbb00000002",
            "2 protocols",
            "654.32",
            "[7.250, 888.5]",
            HOSTILE,
            // averages
            "mean over the steps since the one before it (10 steps)",
            ", logarithmic, means of up to 9 values",
            "skipped_steps 0",
            // configurations, speed, memory
            "optimizer.learning_rate0.0010.002",
            "0.5000",
            "2.500",
            "autoencoder12.5",
        ] {
            assert!(text.contains(words), "`{words}` is not in\n{text}");
        }
        assert!(!text.contains("255.89"), "below 0 nothing is told");
        assert!(!text.contains("window_fvd"), "a curve of a long evaluation is no training");
        assert!(!text.contains("seed0"), "keys that do not differ are not in the table");

        let asked: Vec<&str> = browser
            .events
            .iter()
            .filter(|event| event["method"] == "Network.requestWillBeSent")
            .filter_map(|event| event["params"]["request"]["url"].as_str())
            .filter(|url| !url.starts_with("data:"))
            .collect();
        assert_eq!(asked, [format!("file://{}", page.display())], "the page alone was asked for");
        let out = browser.value(BREAK_OUT);
        let refused = "connect-src img-src script-src-elem style-src-elem";
        assert_eq!(out, json!({"refused": refused, "hostile": true, "shown": "block"}));
        assert!(!browser.events.iter().any(|event| event["method"] == "Runtime.exceptionThrown"));
    }
}

/// A part of it alone, and several folders at once.
#[test]
fn any_folder_makes_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    runs(&at.join("job"));
    let page = |arguments: &[&str]| {
        succeed_in(at, &[&["report"], arguments].concat());
        fs::read_to_string(at.join("report.html")).unwrap()
    };
    let of =
        |runs: &[&str]| page(runs).split("<h2>").skip(1).map(|s| s.split('<').next().unwrap().to_string()).collect();
    let sections: Vec<String> = of(&["job/first"]);
    assert_eq!(sections, ["Training", "Speed and memory", "Configurations"]);
    let sections: Vec<String> = of(&["job/evaluation"]);
    assert_eq!(sections, ["Sample videos", "Reconstructions and other sheets", "FVD and KVD"]);
    let sections: Vec<String> = of(&["job/long"]);
    assert_eq!(sections, ["Sample videos", "FVD and KVD along long videos"]);
    let sections: Vec<String> = of(&["job/evaluation/samples"]);
    assert_eq!(sections, ["Sample videos"]);
    // a picture that several evaluations have is shown once, with their names, and another one beside it
    let sheet = |folder: &str| at.join("job").join(folder).join("reconstructions.png");
    for (folder, figures) in [("same", "other"), ("third", "other")] {
        fs::create_dir(at.join("job").join(folder)).unwrap();
        fs::copy(at.join("job").join(figures).join("figures.json"), at.join("job").join(folder).join("figures.json"))
            .unwrap();
    }
    fs::copy(sheet("evaluation"), sheet("same")).unwrap();
    pictures::write_png(&sheet("third"), &pictures::grid(&moving_clips(2, 16, 32), 4).unwrap()).unwrap();
    let sheets = page(&["job/evaluation", "job/same", "job/third"]);
    assert_eq!(sheets.matches("data:image/png").count(), 2);
    let shown = sheets.find("The same picture is in same/reconstructions.png.").expect("whose picture it is");
    assert!(sheets.find("<h3>evaluation/reconstructions.png</h3>").unwrap() < shown);
    assert!(sheets.contains("<h3>third/reconstructions.png</h3>"));
    // twice the same is the same once
    let both = page(&["job/first", "job/second"]);
    assert_eq!(both, page(&["job/first", "job/second"]));
    let again = page(&["job/first", "job/second", "job/first"]);
    assert_eq!(both.matches("<svg").count(), again.matches("<svg").count());
}

/// One line that names the file and the place, and no page.
#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let refused = |run: &str, status: i32, words: &[&str]| {
        let said = run_in(at, &["report", run]);
        let line = said.error(status);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}\n{line}");
        assert!(!at.join("report.html").exists());
    };
    refused("nowhere", 2, &["no folder nowhere"]);
    fs::create_dir(at.join("empty")).unwrap();
    refused("empty", 2, &["empty holds nothing", "it is empty", "experiment.yaml", "figures.json", "two levels"]);
    put(&at.join("foreign/deep/er/still/metrics.jsonl"), "");
    put(&at.join("foreign/a.txt"), "");
    refused("foreign", 2, &["it holds a.txt, deep/", "metrics.jsonl"]);

    put(&at.join("broken/metrics.jsonl"), "{\"step\":1,\"loss\":2.0}\nnonsense\n");
    refused("broken", 1, &["broken/metrics.jsonl, line 2", "JSON"]);
    put(&at.join("broken/metrics.jsonl"), "{\"loss\":2.0}\n");
    refused("broken", 1, &["metrics.jsonl, line 1", "`step`"]);
    put(&at.join("broken/metrics.jsonl"), "{\"step\":1,\"loss\":\"high\"}\n");
    refused("broken", 1, &["metrics.jsonl, line 1", "`loss`"]);
    fs::remove_file(at.join("broken/metrics.jsonl")).unwrap();
    put(&at.join("broken/figures.json"), "{\"figures\": {\"samples\": {\"fvd\": \"much\", \"kvd\": 1.0}}}");
    refused("broken", 1, &["broken/figures.json", "lvdm evaluate", "figures.samples.fvd"]);
    put(&at.join("broken/figures.json"), "{");
    refused("broken", 1, &["broken/figures.json"]);
    fs::remove_file(at.join("broken/figures.json")).unwrap();
    put(&at.join("broken/experiment.yaml"), "a: [");
    refused("broken", 1, &["broken/experiment.yaml", "YAML"]);

    // a line that is being written is not a broken one
    put(&at.join("running/metrics.jsonl"), "{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"lo");
    succeed_in(at, &["report", "running"]);
}
