# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for Stable Diffusion XL.

    accelerate launch sdxl_train_network.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lora --config_file configs/sdxl_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "sdxl")
