//! A network that sees one position of one frame at a time.

use anyhow::{Result, ensure};
use lvdm::{
    networks::{Inputs, Network, NetworkSettings, Ports, Takes},
    nn::{Linear, Scope, linear_flops, timestep_embedding},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Its settings: `network: {kind: pointwise, width: 64}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PointwiseConfig {
    /// Width of the hidden layer.
    pub width: i64,
}

impl NetworkSettings for PointwiseConfig {
    fn validate(&self) -> Result<()> {
        ensure!(self.width >= 2, "width must be at least 2, not {}", self.width);
        Ok(())
    }

    fn multiple_of(&self) -> [i64; 3] {
        [1, 1, 1]
    }

    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>> {
        Ok(Box::new(Pointwise {
            first: Linear::new(&scope.sub("first"), ports.inputs(), self.width),
            time: Linear::new(&scope.sub("time"), self.width, self.width),
            last: Linear::new(&scope.sub("last"), self.width, ports.outputs),
            width: self.width,
            ports: ports.clone(),
        }))
    }

    fn takes(&self) -> Takes {
        Takes { other_clips: true, ..Takes::default() }
    }

    fn flops(&self, ports: &Ports, [_, f, h, w]: [i64; 4], _tokens: i64) -> i64 {
        let positions = f * h * w;
        linear_flops(positions, ports.inputs(), self.width)
            + linear_flops(1, self.width, self.width)
            + linear_flops(positions, self.width, ports.outputs)
    }
}

/// last(silu(first(z) + time(t))).
struct Pointwise {
    first: Linear,
    time: Linear,
    last: Linear,
    width: i64,
    ports: Ports,
}

impl Network for Pointwise {
    fn forward(&self, z: &Tensor, t: &Tensor, given: &Inputs) -> Tensor {
        let x = given.beside(z, &self.ports).permute([0, 2, 3, 4, 1]); // [B, F, h, w, C]
        let time = self.time.forward(&timestep_embedding(t, self.width, Kind::Float)); // [B, width]
        let hidden = (self.first.forward(&x) + time.view([-1, 1, 1, 1, self.width])).silu(); // [B, F, h, w, width]
        self.last.forward(&hidden).permute([0, 4, 1, 2, 3]) // [B, outputs, F, h, w]
    }

    fn ports(&self) -> &Ports {
        &self.ports
    }
}

// What follows is its test, which stands in the same file.

use lvdm::{
    diffusion::{NoisePathConfig, Objective},
    nn::Parameters,
};

use super::common::{noise, plain_loss};

const CPU: tch::Device = tch::Device::Cpu;

#[test]
fn it_learns_and_sees_one_position_at_a_time() {
    let settings: PointwiseConfig = super::settings("{width: 16}");
    settings.validate().unwrap();
    let (parameters, ports) = (Parameters::new(CPU, 3), Ports::of([4, 2, 3, 3]));
    let network = settings.build(&parameters.root(), &ports).unwrap();
    let names: Vec<String> = parameters.named().into_iter().map(|(name, _)| name).collect();
    assert_eq!((names.len(), names[0].as_str(), names[5].as_str()), (6, "first.weight", "last.bias"));
    assert_eq!(settings.flops(&ports, [4, 2, 3, 3], 0), 2 * (18 * 4 * 16 + 16 * 16 + 18 * 16 * 4));

    // a place that changes is the only one that answers differently
    let (z, t) = (noise(0, &[2, 4, 2, 3, 3]), Tensor::from_slice(&[3i64, 700]));
    let changed = z.copy();
    let _ = changed.narrow(2, 1, 1).narrow(3, 2, 1).narrow(4, 0, 1).fill_(5.0);
    let answer = |z: &Tensor, t: &Tensor| network.forward(z, t, &Inputs::default());
    let difference = (answer(&z, &t) - answer(&changed, &t)).abs().amax([0, 1].as_slice(), false);
    assert_eq!((answer(&z, &t).size(), difference.count_nonzero(None).int64_value(&[])), (z.size(), 1));
    assert!(!answer(&z, &t).allclose(&answer(&z, &Tensor::from_slice(&[3i64, 3])), 1e-5, 1e-6, false));

    let path = NoisePathConfig::default().build().unwrap();
    let z_0 = Tensor::ones([2, 4, 2, 3, 3], (Kind::Float, CPU));
    let loss = || plain_loss(&Objective::default(), &*network, &*path, &z_0, &[500.0, 900.0], &z).mean(Kind::Float);
    let before = loss().double_value(&[]);
    for _ in 0..40 {
        parameters.zero_grad();
        loss().backward();
        for (name, mut tensor) in parameters.trainable() {
            assert!(tensor.grad().defined(), "{name} has no gradient");
            tch::no_grad(|| tensor -= tensor.grad() * 0.1);
        }
    }
    assert!(loss().double_value(&[]) < 0.7 * before, "{before} → {}", loss().double_value(&[]));
}
