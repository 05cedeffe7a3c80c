# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for Stable Diffusion 1.x / 2.x.

    accelerate launch train_network.py --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \
        --output_dir output --output_name my_lora --network_module networks.lora --network_dim 16 --network_alpha 8 \
        --learning_rate 1e-4 --optimizer_type AdamW8bit --mixed_precision bf16 --max_train_epochs 10
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "sd")
