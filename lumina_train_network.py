# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for Lumina-Image 2.0.

    accelerate launch lumina_train_network.py --pretrained_model_name_or_path lumina-image-2.safetensors \
        --gemma2 gemma2.safetensors --ae ae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lora --config_file configs/lumina_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "lumina")
