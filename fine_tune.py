# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of Stable Diffusion 1.x / 2.x, with --train_text_encoder those of its text encoder too.

    accelerate launch fine_tune.py --pretrained_model_name_or_path model.safetensors --in_json metadata.json \
        --train_data_dir pictures --resolution 512 --output_dir output --output_name my_model \
        --config_file configs/sd_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "sd")
