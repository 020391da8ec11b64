# make demo         set up, build, fetch weights, run the main job on generated videos
# make long         after make demo: 256 frames by LVDM, TATS, MCVD and reconstruction guidance, curves
# make efficiency   after make demo: latents, a cascade and MCVD, trained for the same time, three seeds each;
#                   make efficiency COMPARED="latents pixels" SEEDS=0 for one U-Net in two spaces
# make comparison   after make demo: U-Net and Latte with several objectives and noise paths, and with classes
# make ablation     after make demo: joint against factorized attention; perturbation of given frames, guidance weights
# make ucf101       the paper's experiments on UCF-101, for a machine with GPUs and the videos in data/ucf101;
#                   also make sky-timelapse, make taichi; stopped, they go on where they were.
#                   make ucf101 NPROC=8 uses eight GPUs: a step then has eight times as many clips
# make test         set up, build, fetch weights, run all tests
# make lint         formatting, clippy and documentation, warnings as errors
# make soak         kill a training two hundred times and compare it with one never interrupted
# make bench-scaling   two ranks against one; on a quiet machine
# make setup        install what is missing; after it plain `cargo build` and `cargo test` work too
#
# Everything is built in the release profile, so that `demo` and `test` share one build.

# The data sets of the paper.
PAPER = ucf101 sky_timelapse taichi

.PHONY: setup build weights demo long efficiency comparison ablation $(PAPER) sky-timelapse test lint soak bench-scaling clean-runs

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
	target/release/lvdm encode runs/demo/autoencoder --videos data/demo/train --resolution 32 \
		--frames $* --clips 1536 --out $@

# It and every comparison go on where they were; without what `make demo` leaves they say what is missing.
long: weights runs/demo/latents-48.safetensors runs/demo/latents-10.safetensors
	for run in continuation prediction interpolation; do \
		target/release/lvdm train diffusion experiments/demo/$$run.yaml || exit; \
	done
	target/release/lvdm train autoencoder experiments/tats/demo/autoencoder.yaml
	for run in transformer sparse interpolation; do \
		target/release/lvdm train transformer experiments/tats/demo/$$run.yaml || exit; \
	done
	target/release/lvdm train diffusion experiments/mcvd/demo.yaml
	target/release/lvdm evaluate-long experiments/$@/demo.yaml
	target/release/lvdm report runs/$@/demo --out runs/$@/demo/report.html

# Trainings of a model differ in their seed alone; that of a cascade has two stages.
efficiency: COMPARED = latents cascade mcvd
efficiency: SEEDS = 0 1 2
efficiency: IN_EFFICIENCY = $(foreach run,$(COMPARED),$(SEEDS:%=runs/efficiency/demo/seed-%/$(run)))
efficiency: weights
	for seed in $(SEEDS); do for run in $(COMPARED); do \
		at=runs/$@/demo/seed-$$seed; \
		base=; \
		if test $$run = cascade; then \
			base=superresolution.base=$$at/cascade_base; \
			target/release/lvdm train diffusion experiments/$@/demo/cascade_base.yaml seed=$$seed --run $$at/cascade_base || exit; \
		fi; \
		target/release/lvdm train diffusion experiments/$@/demo/$$run.yaml seed=$$seed $$base --run $$at/$$run || exit; \
		test $$at/$$run/evaluation/figures.json -nt $$at/$$run/checkpoints || \
			target/release/lvdm evaluate experiments/$@/demo/evaluate.yaml generated.run=$$at/$$run out=$$at/$$run/evaluation || exit; \
	done; done
	target/release/lvdm report efficiency $(IN_EFFICIENCY)
	target/release/lvdm report $(IN_EFFICIENCY) --out runs/$@/demo/report.html

COMPARED_BY_ABLATION = factorized joint
ablation: weights
	for run in $(COMPARED_BY_ABLATION); do \
		target/release/lvdm train diffusion experiments/$@/demo/$$run.yaml || exit; \
		test runs/$@/demo/$$run/evaluation/figures.json -nt runs/$@/demo/$$run/checkpoints || \
			target/release/lvdm evaluate experiments/$@/demo/evaluate_$$run.yaml || exit; \
	done
	target/release/lvdm report efficiency $(COMPARED_BY_ABLATION:%=runs/$@/demo/%)

# The demo's clips once more, with their classes.
runs/comparison/demo/latents.safetensors: | weights
	target/release/lvdm encode runs/demo/autoencoder --videos data/demo/index.jsonl --split train --resolution 32 \
		--clips 2048 --out $@

IN_COMPARISON = unet_noise unet_velocity unet_flow latte latte_flow unet_class
OF_COMPARISON = $(IN_COMPARISON:%=runs/comparison/demo/%)
comparison: runs/comparison/demo/latents.safetensors | weights
	for run in $(IN_COMPARISON); do \
		target/release/lvdm train diffusion experiments/$@/demo/$$run.yaml || exit; \
		test runs/$@/demo/$$run/evaluation/figures.json -nt runs/$@/demo/$$run/checkpoints || \
			target/release/lvdm evaluate experiments/$@/demo/evaluate_$$run.yaml || exit; \
	done
	test runs/$@/demo/unet_class/evaluation_guided/figures.json -nt runs/$@/demo/unet_class/checkpoints || \
		target/release/lvdm evaluate experiments/$@/demo/evaluate_unet_class_guided.yaml
	target/release/lvdm report efficiency $(OF_COMPARISON)
	target/release/lvdm report $(OF_COMPARISON) --out runs/$@/demo/report.html

# The demo's own files, at fewer and shorter videos.
ablation: ablation-long
ablation-long: weights
	target/release/lvdm train diffusion experiments/demo/continuation.yaml
	target/release/lvdm train diffusion experiments/demo/continuation_clean.yaml
	target/release/lvdm evaluate-long experiments/demo/long_ablation.yaml videos=12 frames=64 evaluation.clips=48 \
		train=null out=runs/ablation/demo/long

data/%/index.jsonl: | weights
	target/release/lvdm data prepare $(subst _,-,$*) data/$*

# A training that is done is not done again, and one that was stopped goes on (its status, 75, ends the chain); so do
# long videos. Samples are measured again where there is a later checkpoint.
RANKS = $(if $(NPROC),--nproc $(NPROC))
$(PAPER): %: data/%/index.jsonl | weights
	target/release/lvdm train autoencoder experiments/$@/autoencoder.yaml $(RANKS)
	target/release/lvdm train diffusion experiments/$@/diffusion.yaml $(RANKS)
	target/release/lvdm sample runs/$@/diffusion --videos 16 --batch 2 --out runs/$@/samples $(RANKS)
	test runs/$@/evaluation/figures.json -nt runs/$@/diffusion/checkpoints || \
		target/release/lvdm evaluate experiments/$@/evaluate.yaml $(RANKS)
	target/release/lvdm train diffusion experiments/$@/prediction.yaml $(RANKS)
	target/release/lvdm train diffusion experiments/$@/interpolation.yaml $(RANKS)
	target/release/lvdm train diffusion experiments/$@/continuation.yaml $(RANKS)
	target/release/lvdm evaluate-long experiments/$@/long.yaml $(RANKS)

# As `lvdm data prepare` spells it.
sky-timelapse: sky_timelapse

test: weights
	cargo test --release --locked

lint: setup
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps

soak: setup
	LVDM_SOAK=200 cargo test --release --locked --test checkpoints -- --nocapture again_and_again

bench-scaling: setup
	cargo bench --profile release --locked --bench scaling

# What `make demo` wrote.
clean-runs:
	rm -rf runs/demo data/demo
