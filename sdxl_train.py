# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of Stable Diffusion XL, with --train_text_encoder those of its two text encoders too.

    accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/sdxl_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "sdxl")
