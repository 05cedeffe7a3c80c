# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA (or another adapter network) for Stable Diffusion 3 / 3.5.

    accelerate launch sd3_train_network.py --pretrained_model_name_or_path sd3.5_medium.safetensors \
        --clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lora --config_file configs/sd3_lora.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("network", "sd3")
