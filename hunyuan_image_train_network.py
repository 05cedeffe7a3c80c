# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for HunyuanImage-2.1.

    accelerate launch hunyuan_image_train_network.py --pretrained_model_name_or_path hunyuanimage2.1.safetensors \
        --text_encoder qwen_2.5_vl_7b.safetensors --byt5 byt5_small_glyphxl_fp16.safetensors \
        --vae hunyuan_image_2.1_vae_fp16.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lora \
        --config_file configs/hunyuan_image_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "hunyuan_image")
