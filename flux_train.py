# SPDX-License-Identifier: Apache-2.0
r"""Train all weights of FLUX.1 (dev, schnell).

    accelerate launch flux_train.py --pretrained_model_name_or_path flux1-dev.safetensors \
        --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_model --config_file configs/flux_full.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("finetune", "flux")
