# make demo         set up, build, fetch weights, run the main job on generated videos
# make demo-long    after it: prediction and interpolation models, 256 frames two ways, curves
# make test         set up, build, fetch weights, run all tests
# make lint         formatting and clippy, warnings as errors
# make soak         kill a training two hundred times and compare it with one never interrupted
# make bench-scaling   two ranks against one; on a quiet machine
# make setup        install what is missing; after it plain `cargo build` and `cargo test` work too
#
# Everything is built in the release profile, so that `demo` and `test` share one build.

.PHONY: setup build weights demo demo-long test lint soak bench-scaling clean-runs

export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

setup:
	@./setup.sh

build: setup
	cargo build --release --locked

weights: build
	target/release/lvdm weights fetch

demo: weights
	target/release/lvdm demo

# Latents of 48 frames for the sparse prediction model, of 10 for the interpolation model.
runs/demo/latents-%.safetensors: | weights
	target/release/lvdm data pack --latents runs/demo/autoencoder --videos data/demo/train --resolution 32 \
		--frames $* --clips 1536 --out $@

demo-long: weights runs/demo/latents-48.safetensors runs/demo/latents-10.safetensors
	target/release/lvdm train diffusion experiments/demo/prediction.yaml
	target/release/lvdm train diffusion experiments/demo/interpolation.yaml
	target/release/lvdm train diffusion experiments/demo/continuation.yaml
	target/release/lvdm evaluate-long experiments/demo/long.yaml

test: weights
	cargo test --release --locked

lint: setup
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings

soak: setup
	LVDM_SOAK=200 cargo test --release --locked --test checkpoints -- --nocapture again_and_again

bench-scaling: setup
	cargo bench --profile release --locked --bench scaling

# What `make demo` wrote.
clean-runs:
	rm -rf runs/demo data/demo
