# SPDX-License-Identifier: Apache-2.0
r"""DreamBooth: teach Stable Diffusion 1.x / 2.x one person or thing, with pictures of its class not to forget.

    accelerate launch train_db.py --pretrained_model_name_or_path model.safetensors --train_data_dir pictures \
        --reg_data_dir class_pictures --resolution 512 --output_dir output --output_name my_character \
        --config_file configs/dreambooth.toml
"""

from library.cli import run

if __name__ == "__main__":
    run("dreambooth", "sd")
