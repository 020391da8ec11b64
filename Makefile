# make demo    set up, build, fetch weights, run the main job on generated videos
# make test    set up, build, fetch weights, run all tests
# make lint    formatting and clippy, warnings as errors
# make setup   install what is missing; after it plain `cargo build` and `cargo test` work too
#
# Everything is built in the release profile, so that `demo` and `test` share one build.

.PHONY: setup build weights demo test lint clean-runs

export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

setup:
	@./setup.sh

build: setup
	cargo build --release --locked

weights: build
	target/release/lvdm weights fetch

demo: weights
	target/release/lvdm demo

test: weights
	cargo test --release --locked

lint: setup
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings

# What `make demo` wrote.
clean-runs:
	rm -rf runs/demo data/demo
