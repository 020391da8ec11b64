//! A headless browser, driven over a pipe by the DevTools protocol.

use std::{
    collections::VecDeque,
    env,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

const NAMES: [&str; 5] =
    ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/// Longer than any answer takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// One page of a browser, which ends with it.
pub struct Browser {
    process: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Option<String>,
    count: u64,
    /// What happened, in order, and was not asked for.
    pub events: VecDeque<Value>,
}

/// `LVDM_BROWSER`, or the first of the known names that is installed.
fn program() -> PathBuf {
    if let Some(own) = env::var_os("LVDM_BROWSER") {
        return own.into();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let places = |name: &str| env::split_paths(&path).map(|folder| folder.join(name)).collect::<Vec<_>>();
    NAMES.iter().flat_map(|name| places(name)).find(|file| file.is_file()).unwrap_or_else(|| {
        panic!(
            "this test opens pages in a browser, and none of {NAMES:?} is in PATH: run `make setup`, which installs \
             chromium-headless-shell, or set LVDM_BROWSER to a Chromium or Chrome"
        )
    })
}

impl Browser {
    /// Starts one whose profile lies in `folder`, with an empty page.
    pub fn start(folder: &Path) -> Self {
        // the protocol is spoken on descriptors 3 and 4
        let mut process = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null 1>&2"])
            .arg(program())
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"])
            .arg(format!("--user-data-dir={}", folder.join("profile").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let (to, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (send, from) = channel();
        thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("the browser speaks JSON");
                if send.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser = Browser { process, to, from, session: None, count: 0, events: VecDeque::new() };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attached = browser.call("Target.attachToTarget", json!({"targetId": target["targetId"], "flatten": true}));
        browser.session = attached["sessionId"].as_str().map(String::from);
        for domain in ["Page.enable", "Runtime.enable", "Network.enable", "Log.enable"] {
            browser.call(domain, json!({}));
        }
        browser
    }

    /// One command of the protocol, and its answer.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.count += 1;
        let mut message = json!({"id": self.count, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let sent = write!(self.to, "{message}\0").and_then(|()| self.to.flush());
        sent.unwrap_or_else(|error| panic!("{} is gone at {method}: {error}", program().display()));
        loop {
            let answer = self.next(method);
            if answer["id"] == self.count {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push_back(answer);
        }
    }

    fn next(&mut self, waiting_for: &str) -> Value {
        let message = self.from.recv_timeout(PATIENCE);
        message.unwrap_or_else(|error| panic!("{} does not answer to {waiting_for}: {error}", program().display()))
    }

    /// Opens a file in a window of so many pixels; a narrow one is a phone's.
    pub fn open(&mut self, file: &Path, width: i64, height: i64, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        self.call(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        );
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        self.events.clear();
        self.call("Page.navigate", json!({"url": format!("file://{}", file.display())}));
        while !self.events.iter().any(|event| event["method"] == "Page.loadEventFired") {
            let event = self.next("opening a page");
            self.events.push_back(event);
        }
    }

    /// The value of an expression in the page, after what it waits for.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let answer = self.call("Runtime.evaluate", parameters);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
