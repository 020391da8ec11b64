//! The way back through what was computed.

use tch::Tensor;

use super::{autocast::Autocast, rounded_weights::go_back};

/// Adds the gradients of a scalar to those of the parameters it comes from. The operations of the way back take the
/// precision that the way there had; mixed precision does not choose it anew.
pub fn backward(loss: &Tensor) {
    let _precision = Autocast::bfloat16(loss.device(), false);
    go_back();
    loss.backward();
}

/// The gradient of a scalar by one tensor, in the precision of [`backward`]; parameters gain none. Without `keep_graph` there
/// is no second one through the same operations.
pub fn gradient(of: &Tensor, by: &Tensor, keep_graph: bool) -> Tensor {
    let _precision = Autocast::bfloat16(of.device(), false);
    Tensor::run_backward(&[of], &[by], keep_graph, false).remove(0)
}
