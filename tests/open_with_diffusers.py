"""SOURCE EXPORTED: opens an exported folder with diffusers, and compares it with a pipeline of the source's parts: every
tensor, the tokens, and the pictures that both make of the same noise."""

import json
import os
import sys

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

source, exported = sys.argv[1:]
torch.set_num_threads(1)


def at(*names):
    return os.path.join(source, *names)


text = CLIPTextModel(CLIPTextConfig(**json.load(open(at("text_encoder", "config.json")))))
text.load_state_dict(load_file(at("text_encoder", "model.safetensors")), strict=False)
opened = StableDiffusionPipeline.from_pretrained(exported)
own = StableDiffusionPipeline(
    unet=UNet2DConditionModel.from_pretrained(at("unet")),
    vae=AutoencoderKL.from_pretrained(at("vae"), variant="fp16"),
    text_encoder=text,
    tokenizer=CLIPTokenizer(at("tokenizer", "vocab.json"), at("tokenizer", "merges.txt"), model_max_length=12),
    scheduler=DDIMScheduler.from_config(opened.scheduler.config),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
for part in ["unet", "vae", "text_encoder"]:
    a, b = getattr(own, part).state_dict(), getattr(opened, part).state_dict()
    assert a.keys() == b.keys(), part
    assert all(torch.equal(a[name], b[name]) for name in a), part
    print(f"{part}: {len(a)} tensors are equal")
prompts = ["a red cat", "a dog, and something that is cut"]
ids = [p.tokenizer(prompts, padding="max_length", truncation=True).input_ids for p in (own, opened)]
assert ids[0] == ids[1], ids


def pictures(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.LatentDiffusion().manual_seed(1)
    sides = {"height": 16, "width": 16}
    made = pipeline(prompts, num_inference_steps=4, guidance_scale=7.5, generator=noise, output_type="np", **sides)
    return torch.from_numpy(made.images)


difference = (pictures(own) - pictures(opened)).abs().max().item()
print(f"pictures differ by {difference} at most")
assert difference == 0
