# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for Anima.

    accelerate launch anima_train_network.py --pretrained_model_name_or_path anima-base.safetensors \
        --qwen3 qwen_3_06b_base.safetensors --vae qwen_image_vae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lora --config_file configs/anima_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "anima")
