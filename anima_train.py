# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of Anima.

    accelerate launch anima_train.py --pretrained_model_name_or_path anima-base.safetensors \
        --qwen3 qwen_3_06b_base.safetensors --vae qwen_image_vae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/anima_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "anima")
