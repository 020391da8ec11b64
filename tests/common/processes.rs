//! Ranks that tests start, stop and wait for.

use std::{
    io::Read,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::Said;

/// A port that nobody uses now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts this command as one of so many ranks, whose store is at `host:port`.
pub fn start_rank(mut command: Command, rank: usize, size: usize, host: &str, port: u16) -> Child {
    command
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", size.to_string())
        .env("MASTER_ADDR", host)
        .env("MASTER_PORT", port.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Starts one process for each of two ranks, as torchrun would.
pub fn start(command: impl FnMut() -> Command) -> [Child; 2] {
    start_ranks(command)
}

/// As [`start`], for so many ranks.
pub fn start_ranks<const RANKS: usize>(mut command: impl FnMut() -> Command) -> [Child; RANKS] {
    let port = free_port();
    std::array::from_fn(|rank| start_rank(command(), rank, RANKS, "127.0.0.1", port))
}

/// Waits for a process to end.
pub fn said(child: Child) -> Said {
    child.wait_with_output().unwrap().into()
}

/// Sends the signal of this name.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status().unwrap();
    assert!(sent.success());
}

/// The status and last words of a rank that must end within the time.
pub fn ends_within(mut child: Child, seconds: u64) -> (i32, String) {
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(seconds) {
            signal(&child, "KILL");
            panic!("still running after {seconds} s");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    println!("ended after {:.1} s: {}", start.elapsed().as_secs_f64(), text.trim());
    (status.code().unwrap_or(-1), text)
}
