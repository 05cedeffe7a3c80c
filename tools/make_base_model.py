# SPDX-License-Identifier: Apache-2.0
"""Make the built-in base model: pictures, autoencoder, text encoder, denoiser, diffusers folder, score.

The shipped examples/base_model was made with the settings of

    python tools/make_base_model.py --stage all --work /tmp/base --deadline_minutes 105

Each stage reads what the earlier ones left in the work folder, so they can also be run one by one.
The denoiser stage goes on from its last save when started again after a stop.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from base_model.assemble import assemble, folder_bytes, load_pipeline, sample
from base_model.draw import (
    CONCEPT_BACKGROUNDS,
    concept_scene,
    contact_sheet,
    draw_scene,
    picture_chunk,
    picture_set,
    shape_piles,
    write_known_examples,
    write_rocket_examples,
)
from base_model.score import known_prompts, known_report
from base_model.text import pretrain_text_encoder, token_ids
from base_model.tokenizer import build_tokenizer
from base_model.training import Budget, save_atomically
from base_model.unet import DenoiserTraining, TrainingSet, UnetOptions, build_unet, in_processes, train_denoiser
from base_model.vae import encode, polish_decoder, psnr, train_vae
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

PICTURE_SEED, HELD_OUT_SEED, POLISH_SEED = 1000, 77, 5000
EXAMPLES = Path(__file__).parent.parent / "examples"


def make_pictures(options: argparse.Namespace) -> None:
    with Pool() as pool:
        pictures, scenes = picture_set(PICTURE_SEED, options.pictures, map_fn=pool.map)
    options.work.mkdir(parents=True, exist_ok=True)
    np.save(options.work / "pictures.npy", pictures)
    (options.work / "captions.json").write_text(json.dumps([scene.caption for scene in scenes]))
    print(f"pictures: {len(pictures)}, {len({scene.caption for scene in scenes})} different captions")


def make_vae(options: argparse.Namespace) -> None:
    pictures = np.load(options.work / "pictures.npy")
    vae = train_vae(pictures, Budget(samples=options.vae_samples))
    vae.save_pretrained(options.work / "vae")
    held_out, _ = picture_chunk(HELD_OUT_SEED, 200)
    print(f"vae: {psnr(vae, held_out):.2f} dB on 200 held-out pictures")
    latents = encode(vae, pictures)
    save_atomically(latents, options.work / "latents.pt")
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()}, deviation {latents.std((0, 2, 3)).tolist()}")


def polish_vae(options: argparse.Namespace) -> None:
    """Train the autoencoder on captioned pictures and as many random shapes, so that it can encode other pictures."""
    vae = AutoencoderKL.from_pretrained(options.work / "vae")
    known, _ = picture_chunk(POLISH_SEED, options.polish_pictures)
    pictures = np.concatenate([known, shape_piles(POLISH_SEED, options.polish_pictures)])
    held_out, _ = picture_chunk(HELD_OUT_SEED, 200)
    piles, rocket = shape_piles(HELD_OUT_SEED, 100), _rocket_pictures()
    before = psnr(vae, held_out), psnr(vae, piles), psnr(vae, rocket)
    polish_decoder(vae, pictures, Budget(samples=options.polish_samples))
    after = psnr(vae, held_out), psnr(vae, piles), psnr(vae, rocket)
    vae.save_pretrained(options.work / "vae_polished")
    for name, old, new in zip(("things", "shape piles", "rocket"), before, after):
        print(f"polish: {name} {old:.2f} -> {new:.2f} dB")


def _rocket_pictures() -> np.ndarray:
    rng = random.Random(HELD_OUT_SEED)
    return np.stack([np.asarray(draw_scene(concept_scene(rng, name), rng)) for name in CONCEPT_BACKGROUNDS])


def make_text_encoder(options: argparse.Namespace) -> None:
    encoder = pretrain_text_encoder(build_tokenizer(), Budget(samples=options.text_samples))
    encoder.save_pretrained(options.work / "text_encoder")


def _denoiser_training(options: argparse.Namespace) -> DenoiserTraining:
    torch.manual_seed(0)
    text_encoder = CLIPTextModel.from_pretrained(options.work / "text_encoder")
    training = DenoiserTraining(build_unet(), text_encoder, UnetOptions(batch_size=options.batch_size))
    checkpoint = options.work / "denoiser.pt"
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
        print(f"denoiser: going on from {training.samples} samples, {training.minutes:.1f} min")
    return training


def make_unet(options: argparse.Namespace) -> None:
    in_processes(_train_unet, options.processes, options)


def _train_unet(options: argparse.Namespace) -> None:
    training = _denoiser_training(options)
    tokenizer = build_tokenizer()
    captions = json.loads((options.work / "captions.json").read_text())
    data = TrainingSet(
        latents=torch.load(options.work / "latents.pt", weights_only=True),
        token_ids=token_ids(tokenizer, captions),
        empty_ids=token_ids(tokenizer, [""])[0],
    )
    samples = options.samples if options.deadline_minutes is None else None
    budget = Budget(samples=samples, minutes=options.deadline_minutes)
    train_denoiser(training, data, budget, options.work / "denoiser.pt")


def make_folder(options: argparse.Namespace) -> None:
    training = _denoiser_training(options)
    training.use_averages()
    vae = AutoencoderKL.from_pretrained(options.work / "vae_polished")
    assemble(options.output, vae=vae, text_encoder=training.text_encoder, unet=training.unet)
    print(f"assembled in {options.output}: {folder_bytes(options.output)}")


def make_score(options: argparse.Namespace) -> None:
    """Score the assembled folder; the pictures go to score.png in the work folder, one thing per column."""
    prompts = known_prompts(options.score_per_thing)
    images = sample(load_pipeline(options.output), [prompt.caption for prompt in prompts], seed=options.score_seed)
    contact_sheet(images, 8).save(options.work / "score.png")
    print(json.dumps(dataclasses.asdict(known_report(images, prompts)), indent=1))


def make_examples(options: argparse.Namespace) -> None:
    write_rocket_examples(EXAMPLES / "rocket")
    write_known_examples(EXAMPLES / "known")


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "examples": make_examples,
    "pictures": make_pictures,
    "vae": make_vae,
    "polish": polish_vae,
    "text": make_text_encoder,
    "unet": make_unet,
    "assemble": make_folder,
    "score": make_score,
}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "base_model", help="the diffusers folder")
    parser.add_argument("--pictures", type=int, default=16000)
    parser.add_argument("--vae_samples", type=int, default=13000)
    parser.add_argument("--polish_samples", type=int, default=6000)
    parser.add_argument("--polish_pictures", type=int, default=4000)
    parser.add_argument("--text_samples", type=int, default=12800)
    parser.add_argument("--samples", type=int, default=200_000, help="of the denoiser's training")
    parser.add_argument("--deadline_minutes", type=float, help="of denoiser training in all, instead of --samples")
    parser.add_argument("--batch_size", type=int, default=24, help="of the denoiser's training")
    parser.add_argument("--processes", type=int, default=2, help="of the denoiser's training")
    parser.add_argument("--score_per_thing", type=int, default=12, help="pictures of each known thing")
    parser.add_argument("--score_seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the other stages")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    for stage in STAGES if options.stage == "all" else [options.stage]:
        STAGES[stage](options)


if __name__ == "__main__":
    main()
