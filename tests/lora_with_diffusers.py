"""write FOLDER: two LoRAs of FOLDER/pipeline, one by PEFT, one in kohya-ss's names. compare FOLDER: what `lvdm import lora` made
of them against what PEFT and diffusers make, and adapters that `lvdm export lora` wrote, opened by PEFT."""

import os
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

what, folder = sys.argv[1:]
torch.set_num_threads(1)
SCALE = 0.8


def at(*names):
    return os.path.join(folder, *names)


def unet(pipeline):
    return UNet2DConditionModel.from_pretrained(at(pipeline, "unet"))


def alike(what, found, wanted):
    assert found.keys() == wanted.keys(), what
    apart = max((found[k].float() - wanted[k].float()).abs().max().item() for k in wanted)
    assert apart < 1e-6, (what, apart)
    print(f"{what}: {len(wanted)} tensors are alike, at most {apart:.1e} apart")


if what == "write":
    torch.manual_seed(3)
    maps = ["to_q", "to_v", "to_out.0", "conv1"]
    network = get_peft_model(unet("pipeline"), LoraConfig(r=4, lora_alpha=6, target_modules=maps, init_lora_weights=False))
    network.save_pretrained(at("peft"))
    halves = {}
    for name, tensor in unet("pipeline").state_dict().items():
        if name.endswith((".attn1.to_k.weight", ".ff.net.2.weight", ".conv2.weight")):
            place = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            o, i, *k = tensor.shape
            halves[place + ".lora_down.weight"] = 0.1 * torch.randn(4, i, *k)
            halves[place + ".lora_up.weight"] = 0.1 * torch.randn(o, 4, *[1 for _ in k])
            halves[place + ".alpha"] = torch.tensor(2.0)
    for i in range(8):
        place = f"lora_te_text_model_encoder_layers_{i // 4}_self_attn_{['q', 'k', 'v', 'out'][i % 4]}_proj"
        halves[place + ".lora_down.weight"] = 0.1 * torch.randn(4, 24)
        halves[place + ".lora_up.weight"] = 0.1 * torch.randn(24, 4)
        halves[place + ".alpha"] = torch.tensor(2.0)
    save_file(halves, at("kohya.safetensors"))
else:
    network = PeftModel.from_pretrained(unet("pipeline"), at("peft"))
    for module in network.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", SCALE)
    alike("PEFT's own", unet("peft-run-pipeline").state_dict(), network.merge_and_unload().state_dict())

    pipeline = StableDiffusionPipeline.from_pretrained(at("pipeline"))
    pipeline.load_lora_weights(folder, weight_name="kohya.safetensors")
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    merged = StableDiffusionPipeline.from_pretrained(at("kohya-run-pipeline"))
    both = [{f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in getattr(p, part).state_dict().items()} for p in (merged, pipeline)]
    alike("kohya-ss's names", *both)

    network = PeftModel.from_pretrained(unet("pipeline"), at("alone"))
    alike("adapters", unet("trained").state_dict(), network.merge_and_unload().state_dict())
