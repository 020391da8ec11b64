//! One verb, one file.

mod device;
mod verify;

pub use device::DeviceName;
pub use verify::Verify;

/// A mistake in how the program was called or configured: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
