# SPDX-License-Identifier: Apache-2.0
r"""Train a ControlNet-LLLite for Stable Diffusion XL. Each subset of the dataset has a conditioning_data_dir.

    accelerate launch sdxl_train_control_net_lllite.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_control --network_dim 64 --cond_emb_dim 32 \
        --learning_rate 2e-4 --optimizer_type AdamW8bit --mixed_precision bf16 --gradient_checkpointing \
        --cache_latents --cache_text_encoder_outputs --max_train_epochs 10
"""

from library.cli import run

if __name__ == "__main__":
    run("lllite", "sdxl")
