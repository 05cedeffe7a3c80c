# SPDX-License-Identifier: Apache-2.0
"""Textual inversion: what learns and what does not, captions and sentences, files, states, mistakes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.cli import EXIT_STOPPED
from library.data.records import BucketRules, CaptionRules, DatasetConfig, Sample, SubsetConfig
from library.data.scan import DatasetScan, Scan, SubsetScan
from library.errors import UserError
from library.families.registry import FAMILIES, open_family
from library.io.state import load_state, newest_state
from library.options import Resolved, resolve
from library.trainers.methods.textual_inversion import (
    OBJECT_SENTENCES,
    STYLE_SENTENCES,
    check_captions,
)
from library.trainers.methods.textual_inversion_options import TextualInversionOptions
from tests.families import sd, sdxl
from tests.tiny import make_tiny_sd
from tests.trainers import child
from tests.trainers.helpers import (
    Recorded,
    Run,
    argv,
    assert_same_run,
    make_pictures,
    make_trainer,
    micro_generator,
    settle,
    subset,
    write_dataset,
)

WORD = "zapcat"
CAPTIONS = ("zapcat, red, photo", "photo, Zapcat star", "a zapcat", "red, zapcat", "zapcat's dog")
DEFAULTS: dict[str, Any] = {
    "output_name": "x",
    "token_string": WORD,
    "learning_rate": 1e-2,
    "seed": 7,
    "max_train_steps": 4,
    "max_data_loader_n_workers": 0,
    "save_model_as": "safetensors",
}


# ---- runs -----------------------------------------------------------------------------------------------------------


def read(family: str = "sd", **values: Any) -> Resolved:
    given = {"pretrained_model_name_or_path": "m", "dataset_config": "d.toml", "output_dir": "o", **values}
    return resolve(TextualInversionOptions, FAMILIES[family].option_groups, argv(given), prog="test")


def invert(
    dataset: Path, folder: Path, *, family: str = "sd", interrupt_in: int | None = None,
    before: Callable[[Recorded], None] | None = None, **values: Any,
) -> Run:  # fmt: skip
    """One run; `values` stand above DEFAULTS. Errors come as the exceptions that the script turns into lines."""
    given = {
        "pretrained_model_name_or_path": "m",
        **DEFAULTS,
        "dataset_config": dataset,
        "output_dir": folder,
        **values,
    }
    trainer = make_trainer(given, family=family, method="textual_inversion")
    trainer.keep_gradients = True
    trainer.interrupt_in = interrupt_in
    if before is not None:
        trainer.before = before
    code = trainer.run()
    settle()
    return Run(trainer, code, folder)


def stopped(dataset: Path, folder: Path, step: int, **values: Any) -> Run:
    """The same run, stopped by Ctrl-C after `step` steps and resumed."""
    assert invert(dataset, folder, interrupt_in=step, **values).code == EXIT_STOPPED
    return invert(dataset, folder, resume=newest_state(folder, "x"), **values)


@pytest.fixture(scope="module")
def models(ground: Path) -> dict[str, dict[str, Any]]:
    """By name: family and the options that name the model."""
    sd2 = make_tiny_sd(ground / "ti sd2", version=2, v_prediction=True)
    is_2 = {"pretrained_model_name_or_path": sd2, "v2": True, "v_parameterization": True}
    return {
        "sd1": {"family": "sd", "pretrained_model_name_or_path": make_tiny_sd(ground / "ti sd1")},
        "sd2": {"family": "sd", **is_2},
        "sdxl": {"family": "sdxl", **sdxl.make(ground / "ti sdxl")},
    }


@pytest.fixture(scope="module")
def words(ground: Path) -> Path:
    """Three batches an epoch, every caption with the word."""
    return write_dataset(ground / "words.toml", subset(make_pictures(ground / "words", 5, captions=CAPTIONS)))


# ---- what learns ----------------------------------------------------------------------------------------------------

TABLES = {  # encoder -> folders of its tokenizer and of itself, and the name that an adapter of its table would have
    "clip": ("tokenizer", "text_encoder", "lora_te_text_model_embeddings_token_embedding"),
    "clip_l": ("tokenizer", "text_encoder", "lora_te1_text_model_embeddings_token_embedding"),
    "clip_g": ("tokenizer_2", "text_encoder_2", "lora_te2_text_model_embeddings_token_embedding"),
}
NAMES = (WORD, f"{WORD}1", f"{WORD}2")


def resized(model: Path, folder: Path, rows: Mapping[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    """The pipeline with the word's tokens in tokenizers and tables, as transformers adds them.

    Also adapters that change nothing and whose gradient is that of the tables, for the families' literal losses.
    """
    import shutil

    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    shutil.copytree(model, folder)
    adapters: dict[str, Tensor] = {}
    for name, values in rows.items():
        tokenizer_folder, encoder_folder, adapter = TABLES[name]
        tokenizer = CLIPTokenizer.from_pretrained(folder / tokenizer_folder)
        assert tokenizer.add_tokens(list(NAMES)) == 3
        encoder = (CLIPTextModelWithProjection if name == "clip_g" else CLIPTextModel).from_pretrained(
            folder / encoder_folder
        )
        table = encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
        with torch.no_grad():
            table[tokenizer.convert_tokens_to_ids(list(NAMES))] = values
        tokenizer.save_pretrained(folder / tokenizer_folder)
        encoder.save_pretrained(folder / encoder_folder)
        width = table.shape[1]
        adapters[f"{adapter}.alpha"] = torch.tensor(float(width))
        adapters[f"{adapter}.lora_down.weight"] = torch.eye(width)
        adapters[f"{adapter}.lora_up.weight"] = torch.zeros_like(table).requires_grad_()
    return folder, adapters


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_loss_and_gradient_are_those_of_resized_tables(
    model: str, models: dict[str, dict[str, Any]], words: Path, tmp_path: Path
) -> None:
    start: dict[str, Tensor] = {}

    def look(trainer: Recorded) -> None:
        start.update({name: value.clone() for name, value in trainer.trainables.state().items()})

    options = models[model]
    run = invert(words, tmp_path / "run", **options, num_vectors_per_token=3, max_train_steps=1, before=look)
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    expanded = [caption.lower().replace(WORD, " ".join(NAMES)) for caption in batch.captions]
    folder, adapters = resized(options["pretrained_model_name_or_path"], tmp_path / "resized", start)
    literal = (sdxl if model == "sdxl" else sd).loss
    loss = literal(
        {**options, "pretrained_model_name_or_path": folder}, replace(batch, captions=expanded), adapters,
        micro_generator(run, 0),
    )  # fmt: skip
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    (gradients,) = run.trainer.gradients
    assert gradients.keys() == start.keys()
    for name, gradient in gradients.items():
        expected = adapters[f"{TABLES[name][2]}.lora_up.weight"].grad
        assert expected is not None
        assert float(gradient.abs().max()) > 1e-6
        torch.testing.assert_close(gradient, expected[-3:], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_everything_else_stays_to_the_bit(
    model: str, models: dict[str, dict[str, Any]], words: Path, tmp_path: Path
) -> None:
    """Also with weight decay, which optimizers apply to every number of a parameter."""
    before: dict[str, dict[str, Tensor]] = {}

    def weights(trainer: Recorded) -> dict[str, dict[str, Tensor]]:
        modules = {**trainer.models.encoders, "denoiser": trainer.models.denoiser}
        return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}

    def look(trainer: Recorded) -> None:
        before.update(weights(trainer))
        before["rows"] = {name: value.clone() for name, value in trainer.trainables.state().items()}

    run = invert(
        words, tmp_path, **models[model], optimizer_args=["weight_decay=0.5"], num_vectors_per_token=2, before=look
    )
    trainer: Any = run.trainer
    for name, tensors in weights(trainer).items():
        assert tensors.keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in tensors.items()), name
    assert all(not torch.equal(value, before["rows"][name]) for name, value in trainer.trainables.state().items())
    assert [p.shape for p in trainer.trainables.parameters()] == [
        value.shape for value in trainer.trainables.state().values()
    ]
    assert not any(p.requires_grad for module in trainer.models.all() for p in module.parameters())


def test_the_word_learns_a_picture(tmp_path: Path) -> None:
    """With fixed noise the loss of the picture falls, and no other caption changes what the model says."""
    model = make_tiny_sd(tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    louder = lambda name: 30 if "attn2.to_out.0.weight" in name else 1  # random weights hardly listen to the text
    save_file({name: value * louder(name) for name, value in load_file(file).items()}, file, {"format": "pt"})
    data = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "p", 1, captions=(WORD,))), batch_size=1)
    losses: dict[str, list[float]] = {WORD: [], "cat": []}

    @torch.no_grad()
    def measure(trainer: Any) -> None:
        batch = trainer.data.load(trainer.data.plan_epoch(1)[0], step=0)
        for text, found in losses.items():
            generator, t = torch.Generator().manual_seed(0), torch.tensor([700])
            same = replace(batch, captions=[text])
            found.append(sum(trainer.forward.mean_loss(same, generator, t).item() for _ in range(8)))

    run = invert(
        data, tmp_path / "run", pretrained_model_name_or_path=model, num_vectors_per_token=4, learning_rate=0.02,
        max_train_steps=40, min_timestep=700, max_timestep=700, cache_latents=True, before=measure,
    )  # fmt: skip
    measure(run.trainer)
    assert losses[WORD][1] < 0.96 * losses[WORD][0]
    assert losses["cat"][1] == losses["cat"][0]


def test_rows_begin_as_asked(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = models["sd1"]["pretrained_model_name_or_path"]
    encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
    table = encoder.get_input_embeddings().weight.detach()
    cat, dog = CLIPTokenizer.from_pretrained(folder / "tokenizer")("cat dog", add_special_tokens=False).input_ids
    seen: list[Tensor] = []

    def start(**values: Any) -> Tensor:
        look: Any = lambda trainer: seen.append(trainer.trainables.state()["clip"].clone())
        invert(words, tmp_path, **models["sd1"], max_train_steps=1, before=look, **values)
        return seen[-1]

    assert torch.equal(start(init_word="cat", num_vectors_per_token=2), table[[cat, cat]])
    assert torch.equal(start(init_word="cat dog", num_vectors_per_token=3), table[[cat, dog, cat]])
    assert torch.equal(start(init_word="cat dog"), table[[cat]])
    drawn = start(num_vectors_per_token=64)
    assert torch.equal(drawn, start(num_vectors_per_token=64)) and not torch.equal(
        drawn, start(num_vectors_per_token=64, seed=8)
    )
    assert len({tuple(row.tolist()) for row in drawn}) == 64
    assert float(drawn.std()) == pytest.approx(float(table.std()), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"gradient_checkpointing": True}, 0.99999),
        ({"cache_latents": True}, 0.99999),
        ({"mixed_precision": "bf16"}, 0.99),
        ({"mixed_precision": "bf16", "full_bf16": True, "gradient_checkpointing": True}, 0.99),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_ways_to_train_agree(
    changes: dict[str, Any], alike: float, models: dict[str, dict[str, Any]], words: Path, tmp_path: Path
) -> None:
    """alike: least cosine of the gradients."""
    values = {**models["sdxl"], "init_word": "cat", "max_train_steps": 2}
    plain, other = (invert(words, tmp_path / str(len(more)), **values, **more) for more in ({}, changes))
    assert other.losses == pytest.approx(plain.losses, rel=20 * (1 - alike))
    theirs, ours = (run.trainer.gradients[0] for run in (plain, other))
    for name, gradient in theirs.items():
        assert float(torch.cosine_similarity(gradient.flatten(), ours[name].float().flatten(), 0)) > alike
        assert float(ours[name].float().norm() / gradient.norm()) == pytest.approx(1, rel=20 * (1 - alike))


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sentences"), [("object", OBJECT_SENTENCES), ("style", STYLE_SENTENCES)], ids=["object", "style"]
)
def test_templates_replace_all_captions(
    kind: str, sentences: tuple[str, ...], models: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Pictures need no captions then, and those that they have are not looked at."""
    pictures = make_pictures(tmp_path / "p", 4)
    (pictures / "p00.txt").unlink()
    rules = {"shuffle_caption": True, "caption_prefix": "red,", "caption_suffix": "star"}
    data = write_dataset(tmp_path / "d.toml", subset(pictures, **rules))
    values = {**models["sd1"], "max_train_steps": 8, f"use_{kind}_template": True, "cache_latents": True}
    run = invert(data, tmp_path / "run", **values)
    drawn = run.trainer.captions  # type: ignore[attr-defined]
    assert len(drawn) == 16 and set(drawn) <= {sentence.format(WORD) for sentence in sentences}
    assert len(set(drawn)) > 5
    bare = make_pictures(tmp_path / "bare", 4)
    for path in bare.glob("*.txt"):
        path.unlink()
    again = invert(write_dataset(tmp_path / "bare.toml", subset(bare)), tmp_path / "again", **values)
    assert again.losses == run.losses


def test_sentences_are_many_and_different() -> None:
    assert len(set(OBJECT_SENTENCES)) >= 25 and len(set(STYLE_SENTENCES)) == 15
    assert all(sentence.count("{}") == 1 for sentence in OBJECT_SENTENCES + STYLE_SENTENCES)


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("a cat\na zapcat", {"enable_wildcard": True}, True),
        ("a cat\na zapcat", {}, False),  # only the first line is trained
        ("a {dog|zapcat}", {"enable_wildcard": True}, True),
        ("a catBREAKzapcatBREAKred", {"keep_tokens_separator": "BREAK"}, True),
        ("zap;;cat", {"secondary_separator": ";;"}, False),
    ],
)
def test_the_word_is_looked_for_in_what_is_trained(
    tmp_path: Path, text: str, options: dict[str, Any], found: bool
) -> None:
    config = SubsetConfig(str(tmp_path), captions=CaptionRules(**options))
    sample = Sample(str(tmp_path / "a.png"), (64, 64), text, config, 0, 0)
    subsets = (SubsetScan(config, (sample,)),)
    scanned = Scan((DatasetScan(DatasetConfig((config,), BucketRules((64, 64))), subsets),))
    if found:
        check_captions(scanned, "zapcat")
    else:
        with pytest.raises(UserError, match="none of the 1 captions has this word"):
            check_captions(scanned, "zapcat")


def test_captions_without_the_word(
    models: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = make_pictures(tmp_path / "some", 3, captions=("a zapcat", "a cat", "zapcats"))
    invert(write_dataset(tmp_path / "some.toml", subset(some)), tmp_path / "o", **models["sd1"], max_train_steps=1)
    (line,) = [text for text in caplog.messages if "lack the word" in text]
    assert line.startswith("2 captions lack the word zapcat") and "p01.png" in line and "p02.png" in line
    caplog.clear()
    prefixed = write_dataset(tmp_path / "prefixed.toml", subset(some, caption_prefix="zapcat,"))
    invert(prefixed, tmp_path / "o", **models["sd1"], max_train_steps=1)
    assert not any("lack the word" in text for text in caplog.messages)
    none = write_dataset(tmp_path / "none.toml", subset(make_pictures(tmp_path / "none", 3)))
    with pytest.raises(UserError, match="--token_string zapcat: none of the 3 captions has this word: put it"):
        invert(none, tmp_path / "o", **models["sd1"])


def test_weights_in_captions_and_chunks(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """A word in the second chunk learns, at the weight that it has there."""
    long = "cat " * 80
    gradients = []
    for number, text in enumerate((f"{long} zapcat", f"{long} (zapcat:1.5)")):
        pictures = make_pictures(tmp_path / str(number), 1, captions=(text,))
        data = write_dataset(tmp_path / f"{number}.toml", subset(pictures), batch_size=1)
        run = invert(
            data, tmp_path / "o", **models["sdxl"], init_word="cat", weighted_captions=True, max_token_length=150,
            max_train_steps=1,
        )  # fmt: skip
        gradients.append(run.trainer.gradients[0])
    one, other = gradients
    for name in ("clip_l", "clip_g"):
        assert 0 < float(one[name].norm()) < float(other[name].norm())


def test_previews_know_the_word(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zapcat --w 64 --h 64 --s 2 --d 1\na cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    values = {**models["sdxl"], "learning_rate": 1.0, "init_word": "cat", "max_train_steps": 2}
    run = invert(
        words, tmp_path / "run", **values, sample_prompts=prompts, sample_every_n_steps=2, sample_at_first=True
    )
    pictures = sorted((tmp_path / "run" / "sample").glob("x_*.png"))
    content = [Image.open(path).tobytes() for path in pictures if "before" not in path.name]
    first, later = content[:2], content[2:4]
    assert first[0] == first[1] == later[1] and later[0] != later[1]  # the word begins as "cat"
    assert invert(words, tmp_path / "bare", **values).losses == run.losses


# ---- files ----------------------------------------------------------------------------------------------------------

KEYS = {"sd1": {"emb_params": (2, 32)}, "sdxl": {"clip_l": (2, 32), "clip_g": (2, 48)}}


@pytest.mark.parametrize("model", KEYS)
@pytest.mark.parametrize("ending", ["pt", "ckpt", "safetensors"])
def test_file_and_the_way_back(
    ending: str, model: str, models: dict[str, dict[str, Any]], words: Path, tmp_path: Path
) -> None:
    values = {**models[model], "num_vectors_per_token": 2, "save_model_as": ending}
    run = invert(words, tmp_path / "one", **values, max_train_steps=2)
    file = tmp_path / "one" / f"x.{ending}"
    saved = load_file(file) if ending == "safetensors" else torch.load(file, weights_only=True)
    assert {name: tuple(value.shape) for name, value in saved.items()} == KEYS[model]
    own = run.trainer.trainables.state()  # type: ignore[attr-defined]
    assert [torch.equal(a, b) for a, b in zip(saved.values(), (own[n] for n in (own if model == "sd1" else saved)))]
    start: dict[str, Tensor] = {}
    look: Any = lambda trainer: start.update({n: v.clone() for n, v in trainer.trainables.state().items()})
    invert(words, tmp_path / "two", **values, weights=file, max_train_steps=1, before=look)
    assert all(torch.equal(start[name], value) for name, value in own.items())


def test_metadata_and_precision(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    expected = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
    for model, architecture in expected.items():
        run = invert(words, tmp_path / model, **models[model], max_train_steps=1, save_precision="fp16")
        assert {value.dtype for value in run.weights.values()} == {torch.float16}
        found = run.metadata
        assert all(name.startswith("modelspec.") for name in found)
        assert found["modelspec.architecture"] == f"{architecture}/textual-inversion"
        assert found["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
        assert (found["modelspec.title"], found["modelspec.resolution"]) == ("x", "64x64")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_diffusers_opens_it(ending: str, models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = invert(words, tmp_path, **models["sd1"], num_vectors_per_token=3, save_model_as=ending, clip_skip=None)
    pipeline = StableDiffusionPipeline.from_pretrained(models["sd1"]["pretrained_model_name_or_path"])
    pipeline.load_textual_inversion(tmp_path / f"x.{ending}", token=WORD)
    theirs, _ = pipeline.encode_prompt("red zapcat photo", "cpu", 1, False)
    trainer: Any = run.trainer
    with torch.no_grad():
        ours = trainer.family.encode_text(trainer.family.tokenize(["red zapcat photo"]), trainer.models.encoders)
    torch.testing.assert_close(ours["context"], theirs, rtol=1e-5, atol=1e-5)


def test_diffusers_opens_both_parts_for_sdxl(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    """As its users do it: each part into its own encoder."""
    from diffusers import StableDiffusionXLPipeline

    run = invert(words, tmp_path, **models["sdxl"], num_vectors_per_token=2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(models["sdxl"]["pretrained_model_name_or_path"])
    for part, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            run.weights[part], token=WORD, text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )  # fmt: skip
    states, _, pooled, _ = pipeline.encode_prompt("red zapcat photo", device="cpu", do_classifier_free_guidance=False)
    trainer: Any = run.trainer
    with torch.no_grad():
        ours = trainer.family.encode_text(trainer.family.tokenize(["red zapcat photo"]), trainer.models.encoders)
    torch.testing.assert_close(torch.cat([ours["clip_l"], ours["clip_g"]], -1), states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["clip_g_pooled"], pooled, rtol=1e-5, atol=1e-5)


def test_name_of_the_file_is_the_word(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    invert(words, tmp_path, **models["sd1"], output_name=None, save_model_as=None, max_train_steps=1)
    assert (tmp_path / "zapcat.pt").is_file()


# ---- states ---------------------------------------------------------------------------------------------------------

LIVELY: dict[str, Any] = {
    "init_word": "cat dog", "num_vectors_per_token": 3, "lr_scheduler": "cosine", "ema_decay": 0.9, "save_state": True,
    "noise_offset": 0.1, "max_train_steps": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("sd1", {"use_object_template": True}),
        ("sd1", {"mixed_precision": "bf16", "full_bf16": True}),
        ("sdxl", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "cache_latents": True}),
    ],
    ids=["sentences", "full bf16", "sdxl"],
)
def test_stopped_run_ends_as_the_whole_one(
    model: str, changes: dict[str, Any], models: dict[str, dict[str, Any]], words: Path, tmp_path: Path
) -> None:
    values = {**models[model], **LIVELY, **changes}
    whole = invert(words, tmp_path / "whole", **values)
    assert_same_run(stopped(words, tmp_path / "stopped", 4, **values), whole)


def test_killed_run_goes_on(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "killed", tmp_path / "output.txt"
    values = {k: v for k, v in {**DEFAULTS, **models["sd1"], **LIVELY}.items() if k != "family"}
    own = {"dataset_config": words, "output_dir": folder, "save_every_n_steps": 1, "max_train_steps": 10}
    process = child.start(child.script, {**values, **own}, output, "textual_inversion", "sd")
    child.wait_until(lambda: len(child.states(folder)) > 1, process, output)
    process.kill()
    assert child.exit_code(process) == -signal.SIGKILL
    for path in folder.glob("[!.]*.safetensors"):
        assert load_file(path)["emb_params"].shape == (3, 32)
    state = newest_state(folder, "x")
    assert state is not None and load_state(state).step >= 2
    more = {**models["sd1"], **LIVELY, "max_train_steps": 10}
    rest = invert(words, folder, resume=state, **more)
    assert_same_run(rest, invert(words, tmp_path / "whole", **more))


def test_state_of_another_word_is_refused(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    invert(words, tmp_path, **models["sd1"], save_state=True, max_train_steps=1)
    with pytest.raises(UserError, match="--num_vectors_per_token was 1, is 2"):
        invert(words, tmp_path, **models["sd1"], num_vectors_per_token=2, resume=tmp_path / "x-state")


# ---- mistakes -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no word": ({"token_string": None}, "--token_string is missing: give the new word"),
    "brackets": ({"token_string": "a(b)"}, "brackets, commas and line ends mean something in captions; leave out"),
    "spaces": ({"token_string": " a"}, "leave out the spaces around it"),
    "both templates": ({"use_object_template": True, "use_style_template": True}, "use_style_template: give one of"),
    "two starts": ({"init_word": "cat", "weights": "x.pt"}, "--init_word has no effect with --weights"),
    "no vectors": ({"num_vectors_per_token": 0}, "--num_vectors_per_token must be at least 1, got 0"),
    "text cache": ({"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs has no meaning here: the text"),
    "dropout": ({"caption_dropout_rate": 0.1}, "--caption_dropout_rate has no meaning here: a caption without"),
    "prior": ({"masked_prior_weight": 1}, "--masked_prior_weight has no meaning in textual inversion"),
    "name": ({"token_string": "<cat>", "output_name": None}, "'<cat>', which it would be, is not a plain file name"),
    "file type": ({"save_model_as": "bin"}, "'bin' is not one of ckpt, pt, safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str) -> None:
    values, message = BAD[case]
    with pytest.raises(UserError) as told:
        read(**{**DEFAULTS, **values})
    assert len(told.value.problems) == 1 and message in told.value.problems[0]


def test_mistakes_are_said_together_and_before_a_model_is_loaded(
    models: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    pictures = make_pictures(tmp_path / "p", 2)
    attributes = {"diff_output_preservation": True}
    data = write_dataset(tmp_path / "d.toml", subset(pictures, caption_dropout_rate=0.1, custom_attributes=attributes))
    (tmp_path / "x.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError) as told:
        invert(data, tmp_path, **models["sd1"], token_string="Cat", learning_rate=0, optimizer_type="AdamX")
    text = "\n".join(told.value.problems)
    assert "--token_string Cat: the model's vocabulary has this word already" in text and "such as myCat" in text
    assert "nothing learns: --learning_rate is 0" in text
    assert "caption_dropout_rate leaves out the new word" in text and "diff_output_preservation" in text
    assert "AdamX" in text
    assert (tmp_path / "x.safetensors").read_bytes() == b"precious"


def test_wrong_files(models: dict[str, dict[str, Any]], words: Path, tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(4, 32)}, tmp_path / "four.safetensors")
    save_file({"emb_params": torch.zeros(1, 1024)}, tmp_path / "sd2.safetensors")
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 48)}, tmp_path / "xl.safetensors")
    torch.save({"a": [1, 2]}, tmp_path / "none.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 broken")
    cases = (
        ("sd1", "four.safetensors", r"holds 4 vectors: give --num_vectors_per_token 4"),
        ("sd1", "sd2.safetensors", r"vectors of width 1024, the text encoder clip has 32.*\(SD 2.x\)"),
        ("sd1", "xl.safetensors", r"holds clip_g, clip_l, not the vectors of one text encoder"),
        ("sdxl", "four.safetensors", r"lacks clip_l and clip_g"),
        ("sd1", "none.pt", r"holds no vectors"),
        ("sd1", "broken.pt", r"is damaged"),
        ("sd1", "absent.pt", r"does not exist"),
    )
    for model, name, message in cases:
        with pytest.raises(UserError, match=message):
            invert(words, tmp_path / "o", **models[model], weights=tmp_path / name)
        assert not (tmp_path / "o").exists() or not list((tmp_path / "o").glob("*.safetensors"))


def test_other_models_say_that_they_cannot() -> None:
    options = read("flux", **DEFAULTS, clip_l="c", t5xxl="t", ae="a").options
    family = open_family(FAMILIES["flux"], options.model)
    with pytest.raises(UserError, match="textual inversion is not available for this model"):
        family.add_word("zapcat", 1, None)
