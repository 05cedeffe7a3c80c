# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of SANA.

    accelerate launch sana_train.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/sana_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "sana")
