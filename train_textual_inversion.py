# SPDX-License-Identifier: Apache-2.0
r"""Teach Stable Diffusion 1.x / 2.x a new word (textual inversion).

    accelerate launch train_textual_inversion.py --pretrained_model_name_or_path model.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name mycat --token_string mycat --init_word cat \
        --num_vectors_per_token 4 --config_file configs/sd_textual_inversion.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("textual_inversion", "sd")
