# SPDX-License-Identifier: Apache-2.0
r"""Teach Stable Diffusion XL a new word (textual inversion).

    accelerate launch sdxl_train_textual_inversion.py --pretrained_model_name_or_path sdxl.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name mycat --token_string mycat --init_word cat \
        --num_vectors_per_token 4 --mixed_precision bf16 --learning_rate 1e-3 --no_half_vae --gradient_checkpointing
"""

from library.cli import run

if __name__ == "__main__":
    run("textual_inversion", "sdxl")
