# SPDX-License-Identifier: Apache-2.0
"""Making of the built-in base model: a small, really trained Stable-Diffusion-shaped folder.

draw.py       captioned coloured shapes, the rocket concept, picture sets
tokenizer.py  CLIP-layout byte-pair tokenizer with single-token words
vae.py        autoencoder training, latent whitening, decoder polish
text.py       text encoder and its classification pretraining
unet.py       denoiser training: resumable, EMA, warm-up/constant/decay schedule
score.py      which known thing (or the rocket) a picture shows; numpy and PIL only
training.py   budget, learning-rate schedule, averages, safe files
assemble.py   the diffusers folder: writing, loading, sampling
"""
