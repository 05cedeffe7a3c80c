# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of FLUX.2 klein base or dev.

    accelerate launch flux2_train.py --pretrained_model_name_or_path flux-2-klein-base-4b.safetensors \
        --text_encoder qwen_3_4b.safetensors --ae flux2-vae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/flux2_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "flux2")
