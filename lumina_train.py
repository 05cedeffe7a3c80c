# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of Lumina-Image 2.0.

    accelerate launch lumina_train.py --pretrained_model_name_or_path lumina-image-2.safetensors \
        --gemma2 gemma2.safetensors --ae ae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/lumina_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "lumina")
