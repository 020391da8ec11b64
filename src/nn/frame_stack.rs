use tch::Tensor;

/// A batch of videos inside the U-Net: `[B·F, C, H, W]`, channels last in memory.
pub struct FrameStack {
    /// `[B·F, C, H, W]`
    pub x: Tensor,
    /// F
    pub frames: i64,
    /// Whether frames have nothing to do with each other: layers over frames are the identity.
    pub stills: bool,
}

impl FrameStack {
    /// From `[B, C, F, H, W]`.
    pub fn fold(video: &Tensor) -> Self {
        let (b, c, f, h, w) = video.size5().expect("a video [B, C, F, H, W]");
        // memory order B, F, H, W, C
        let x = video.permute([0, 2, 3, 4, 1]).contiguous().reshape([b * f, h, w, c]).permute([0, 3, 1, 2]);
        FrameStack { x, frames: f, stills: false }
    }

    /// To `[B, C, F, H, W]`: a view, channels last in memory.
    pub fn video(&self) -> Tensor {
        let (bf, c, h, w) = self.x.size4().expect("frames [B·F, C, H, W]");
        self.x.permute([0, 2, 3, 1]).reshape([bf / self.frames, self.frames, h, w, c]).permute([0, 4, 1, 2, 3])
    }

    /// The same number of frames with other contents.
    pub fn with(&self, x: Tensor) -> Self {
        FrameStack { x, frames: self.frames, stills: self.stills }
    }

    /// The positions of each frame: `[B·F, H·W, C]`, a view.
    pub fn positions(&self) -> Tensor {
        self.x.permute([0, 2, 3, 1]).flatten(1, 2)
    }

    /// The frames of each position: `[B·H·W, F, C]`, a copy.
    pub fn tracks(&self) -> Tensor {
        let (bf, c, h, w) = self.x.size4().expect("frames [B·F, C, H, W]");
        let f = self.frames;
        self.positions().reshape([bf / f, f, h * w, c]).transpose(1, 2).reshape([bf / f * h * w, f, c])
    }

    /// Back from `[B·F, H·W, C]`.
    pub fn from_positions(&self, positions: &Tensor) -> Self {
        let (bf, _, h, w) = self.x.size4().expect("frames [B·F, C, H, W]");
        self.with(positions.reshape([bf, h, w, -1]).permute([0, 3, 1, 2]))
    }

    /// Back from `[B·H·W, F, C]`.
    pub fn from_tracks(&self, tracks: &Tensor) -> Self {
        let (bf, _, h, w) = self.x.size4().expect("frames [B·F, C, H, W]");
        let f = self.frames;
        self.from_positions(&tracks.reshape([bf / f, h * w, f, -1]).transpose(1, 2).reshape([bf, h * w, -1]))
    }
}

impl std::ops::Add for &FrameStack {
    type Output = FrameStack;
    fn add(self, other: &FrameStack) -> FrameStack {
        self.with(&self.x + &other.x)
    }
}
