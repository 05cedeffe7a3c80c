# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for SANA.

    accelerate launch sana_train_network.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --dataset_config dataset.toml --output_dir output --output_name my_lora --config_file configs/sana_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "sana")
