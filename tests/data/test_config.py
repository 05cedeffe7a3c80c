# SPDX-License-Identifier: Apache-2.0
"""Dataset files and the command line: where a value comes from, and what is said about each mistake."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from library.data.config import load_dataset_config
from library.data.options import CacheOptions, DataOptions, parse_resolution, parse_zoom_range
from library.data.records import DatasetConfig
from library.errors import UserError
from library.options import specs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "meta.json").write_text("{}")
    return tmp_path


def load(folder: Path, text: str, *, name: str = "data.toml", bucket_step: int = 64, cache=None, **options):
    file = folder / name
    file.write_text(text.replace("PICS", str(folder / "pics")).replace("DIR", str(folder)), encoding="utf-8")
    return load_dataset_config(DataOptions(dataset_config=str(file), **options), bucket_step=bucket_step, cache=cache)


def problems(folder: Path, text: str, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text, **options)
    name = str(folder / options.get("name", "data.toml"))
    return [line.removeprefix(name).removeprefix(": ") for line in caught.value.problems]


def one(datasets: tuple[DatasetConfig, ...]):
    assert len(datasets) == 1 and len(datasets[0].subsets) == 1
    return datasets[0], datasets[0].subsets[0]


MINIMAL = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "PICS"\n'


# ---- values -------------------------------------------------------------------------------------------------------


def test_bucket_steps_that_divide_those_of_the_model_become_them(tmp_path, caplog):
    (tmp_path / "p").mkdir()
    path = tmp_path / "d.toml"
    text = "[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = {}\n"
    text += f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'p').as_posix()}'\n"
    path.write_text(text.format(1))
    (found,) = load_dataset_config(DataOptions(dataset_config=str(path)), bucket_step=64)
    assert found.buckets.bucket_reso_steps == 64 and "sides are multiples of 64" in caplog.text
    path.write_text(text.format(64).replace("resolution = 64", "resolution = 1", 1))
    with pytest.raises(UserError) as told:  # and not that none is given
        load_dataset_config(DataOptions(dataset_config=str(path)), bucket_step=64)
    assert [line.partition(": ")[2] for line in told.value.problems] == [
        "general: resolution must be between 8 and 65535, got 1"
    ]


def test_defaults_of_a_minimal_file(folder: Path) -> None:
    """Literal values of v0.10.1's `effective_default`."""
    dataset, subset = one(load(folder, MINIMAL))
    buckets = dataset.buckets
    assert (buckets.resolution, buckets.enable_bucket, buckets.bucket_no_upscale) == ((512, 512), False, False)
    assert (buckets.min_bucket_reso, buckets.max_bucket_reso, buckets.bucket_reso_steps) == (256, 1024, 64)
    assert (dataset.batch_size, dataset.network_multiplier) == (1, 1.0)
    assert (dataset.validation_seed, dataset.validation_split) == (None, 0.0)
    assert (subset.num_repeats, subset.is_reg, subset.class_tokens, subset.caption_extension) == (
        1,
        False,
        None,
        ".caption",
    )
    assert (subset.metadata_file, subset.conditioning_data_dir, subset.custom_attributes) == (None, None, {})
    captions = subset.captions
    assert (captions.shuffle_caption, captions.caption_separator, captions.keep_tokens) == (False, ",", 0)
    assert (captions.keep_tokens_separator, captions.secondary_separator, captions.enable_wildcard) == ("", None, False)
    assert (captions.caption_prefix, captions.caption_suffix) == (None, None)
    assert (captions.caption_dropout_rate, captions.caption_dropout_every_n_epochs) == (0.0, 0)
    assert (captions.caption_tag_dropout_rate, captions.token_warmup_min, captions.token_warmup_step) == (0.0, 1, 0)
    images = subset.images
    assert (images.color_aug, images.flip_aug, images.random_crop, images.alpha_mask) == (False, False, False, False)
    assert (images.face_crop_aug_range, images.resize_interpolation) == (None, None)


def test_fallback_order_subset_dataset_general_command_line(folder: Path) -> None:
    text = """
    [general]
    keep_tokens = 3
    flip_aug = false
    batch_size = 5
    num_repeats = 7
    [[datasets]]
    resolution = [512, 768]
    keep_tokens = 2
    [[datasets.subsets]]
    image_dir = "PICS"
    keep_tokens = 1
    [[datasets.subsets]]
    image_dir = "PICS"
    [[datasets]]
    batch_size = 4
    [[datasets.subsets]]
    image_dir = "PICS"
    caption_extension = "txt"
    """
    options = {
        "keep_tokens": 9,
        "flip_aug": True,
        "shuffle_caption": True,
        "resolution": (640, 640),
        "train_batch_size": 8,
    }
    first, second = load(folder, text, **options)
    assert [s.captions.keep_tokens for s in first.subsets] == [1, 2]  # subset, then its dataset
    assert second.subsets[0].captions.keep_tokens == 3  # then [general]
    assert second.subsets[0].captions.shuffle_caption is True  # then the command line
    assert second.subsets[0].images.flip_aug is False  # false is a value, not a gap
    assert (first.buckets.resolution, second.buckets.resolution) == ((512, 768), (640, 640))
    assert (first.batch_size, second.batch_size) == (5, 4)
    assert [s.num_repeats for s in (*first.subsets, *second.subsets)] == [7, 7, 7]
    assert second.subsets[0].caption_extension == ".txt"


def test_command_line_names_that_differ(folder: Path) -> None:
    dataset, subset = one(load(folder, MINIMAL, train_batch_size=6, dataset_repeats=3))
    assert (dataset.batch_size, subset.num_repeats) == (6, 3)
    assert one(load(folder, MINIMAL, caption_extension=".txt"))[1].caption_extension == ".txt"
    both = one(load(folder, MINIMAL, caption_extension=".txt", caption_extention=".cap"))[1]
    assert both.caption_extension == ".cap"  # the old spelling wins


def test_every_key_is_read(folder: Path) -> None:
    values = {
        "shuffle_caption": True, "caption_separator": ";", "keep_tokens": 2, "keep_tokens_separator": "|||",
        "secondary_separator": ";;;", "enable_wildcard": True, "caption_prefix": "pre", "caption_suffix": "suf",
        "caption_dropout_rate": 0.25, "caption_dropout_every_n_epochs": 4, "caption_tag_dropout_rate": 0.125,
        "token_warmup_min": 3, "token_warmup_step": 0.5,
    }  # fmt: skip
    images = {
        "color_aug": True,
        "flip_aug": True,
        "random_crop": True,
        "resize_interpolation": "area",
        "alpha_mask": True,
    }
    subset = {
        "image_dir": str(folder / "pics"), **values, **images, "face_crop_aug_range": [1.5, 3.0], "num_repeats": 5,
        "is_reg": True, "class_tokens": "cls", "caption_extension": ".tags", "cache_info": True,
        "custom_attributes": {"diff_output_preservation": True, "mine": 1},
    }  # fmt: skip
    dataset = {
        "resolution": [640, 512], "enable_bucket": True, "min_bucket_reso": 320, "max_bucket_reso": 960,
        "bucket_reso_steps": 32, "bucket_no_upscale": True, "batch_size": 3, "network_multiplier": 0.5,
        "validation_seed": 11, "validation_split": 0.1, "subsets": [subset],
    }  # fmt: skip
    found, only = one(load(folder, json.dumps({"datasets": [dataset]}), name="data.json", bucket_step=8))
    assert {key: getattr(only.captions, key) for key in values} == values
    assert {key: getattr(only.images, key) for key in images} == images
    assert only.images.face_crop_aug_range == (1.5, 3.0)
    for key in (
        "image_dir",
        "num_repeats",
        "is_reg",
        "class_tokens",
        "caption_extension",
        "cache_info",
        "custom_attributes",
    ):
        assert getattr(only, key) == subset[key]
    assert found.buckets.resolution == (640, 512)
    for key in ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"):
        assert getattr(found.buckets, key) == dataset[key]
    for key in ("batch_size", "network_multiplier", "validation_seed", "validation_split"):
        assert getattr(found, key) == dataset[key]


@pytest.mark.parametrize("value", ["512", "[512]", "[512, 512]", '"512"', '"512,512"', "512.0"])
def test_forms_of_resolution(folder: Path, value: str) -> None:
    dataset, _ = one(load(folder, MINIMAL.replace("512", value)))
    assert dataset.buckets.resolution == (512, 512)


def test_lenient_numbers(folder: Path) -> None:
    text = MINIMAL.replace("resolution = 512", "resolution = 512\nnetwork_multiplier = 1\nvalidation_split = 0")
    dataset, subset = one(load(folder, text + "face_crop_aug_range = [1, 2]\nnum_repeats = true\nkeep_tokens = '3'\n"))
    assert (dataset.network_multiplier, subset.images.face_crop_aug_range) == (1.0, (1.0, 2.0))
    assert (subset.num_repeats, subset.captions.keep_tokens) == (1, 3)


def test_parse_pairs() -> None:
    assert parse_resolution("640,384") == (640, 384)
    assert parse_resolution("") is None
    assert parse_zoom_range("1.5, 3") == (1.5, 3.0)
    for bad in ("3,1", "1", "a,b", "0,1", "1,inf"):
        with pytest.raises(ValueError, match="two numbers"):
            parse_zoom_range(bad)


# ---- kinds of subsets ---------------------------------------------------------------------------------------------


def test_metadata_and_mask_subsets(folder: Path) -> None:
    text = (
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nmetadata_file = 'DIR/meta.json'\n"
        "[[datasets.subsets]]\nimage_dir = 'PICS'\nconditioning_data_dir = 'DIR/masks'\n"
    )
    (dataset,) = load(folder, "[general]\ncaption_extension = '.txt'\nclass_tokens = 'x'\n" + text, masked_loss=True)
    metadata, masked = dataset.subsets
    assert metadata.image_dir is None and metadata.metadata_file == str(folder / "meta.json")
    assert masked.conditioning_data_dir == str(folder / "masks")


def test_subset_with_no_repeats_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = MINIMAL + "[[datasets.subsets]]\nimage_dir = 'PICS'\nnum_repeats = 0\n"
    one(load(folder, text))
    assert "datasets[0].subsets[1]: num_repeats is 0" in caplog.text
    assert "nothing to train on" in problems(folder, MINIMAL + "num_repeats = 0\n")[0]


def test_folder_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/10_sks dog", "train/3_ünï_code", "train/0_no", "train/notes", "reg/1_dog"):
        (tmp_path / name).mkdir(parents=True)
    options = DataOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution=(512, 512),
        caption_extension=".txt", flip_aug=True, dataset_repeats=4,
    )  # fmt: skip
    (dataset,) = load_dataset_config(options, bucket_step=64)
    seen = [(Path(s.image_dir or "").name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets]
    assert seen == [
        ("10_sks dog", 10, "sks dog", False),
        ("3_ünï_code", 3, "ünï_code", False),
        ("1_dog", 1, "dog", True),
    ]
    assert all(s.caption_extension == ".txt" and s.images.flip_aug for s in dataset.subsets)
    assert "0_no, notes" in caplog.text


def test_in_json(folder: Path) -> None:
    options = DataOptions(
        in_json=str(folder / "meta.json"), train_data_dir=str(folder / "pics"), resolution=(512, 512), dataset_repeats=4
    )
    _, subset = one(load_dataset_config(options, bucket_step=64))
    assert (subset.metadata_file, subset.image_dir) == (str(folder / "meta.json"), str(folder / "pics"))
    assert subset.num_repeats == 4


# ---- mistakes -----------------------------------------------------------------------------------------------------

BAD_LINES = {  # line in the subset -> what is said
    "num_repeat = 2": "datasets[0].subsets[0]: unknown key 'num_repeat'. Did you mean 'num_repeats'?",
    "num_repeats = 'many'": "datasets[0].subsets[0]: num_repeats expects a whole number, got 'many'",
    "num_repeats = 1.5": "datasets[0].subsets[0]: num_repeats expects a whole number, got 1.5",
    "num_repeats = -1": "datasets[0].subsets[0]: num_repeats must be at least 0, got -1",
    "flip_aug = 3": "datasets[0].subsets[0]: flip_aug expects true or false, got '3'",
    "caption_dropout_rate = 1.5": "datasets[0].subsets[0]: caption_dropout_rate must be between 0 and 1, got 1.5",
    "face_crop_aug_range = [2, 1]": (
        "datasets[0].subsets[0]: face_crop_aug_range must be two numbers above 0, the smaller one first, got [2, 1]"
    ),
    "resize_interpolation = 'lancsoz'": (
        "datasets[0].subsets[0]: resize_interpolation 'lancsoz' is not one of "
        "lanczos, nearest, bilinear, linear, bicubic, cubic, area. Did you mean 'lanczos'?"
    ),
    "custom_attributes = 1": (
        "datasets[0].subsets[0]: custom_attributes expects a table such as { diff_output_preservation = true }, got 1"
    ),
    "custom_attributes = { diff_output_preservaton = true }": (
        "datasets[0].subsets[0]: custom_attributes has an unknown key 'diff_output_preservaton'. "
        "Did you mean 'diff_output_preservation'?"
    ),
    "batch_size = 2": "datasets[0].subsets[0]: batch_size cannot stand here; it belongs in [general] or [[datasets]]",
    "train_batch_size = 2": "datasets[0].subsets[0]: unknown key 'train_batch_size'. Did you mean 'batch_size'?",
    "prior_loss_weight = 0.5": (
        "datasets[0].subsets[0]: prior_loss_weight is an option of the script: give --prior_loss_weight"
    ),
    "conditioning_data_dir = 'DIR/masks'": (
        "datasets[0].subsets[0]: conditioning_data_dir has no effect without --task edit or --masked_loss"
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_in_a_subset(folder: Path, line: str) -> None:
    assert problems(folder, MINIMAL + line + "\n") == [BAD_LINES[line].replace("DIR", str(folder))]


def test_all_mistakes_at_once(folder: Path) -> None:
    text = """
    [generall]
    [general]
    caption_extention = ".txt"
    [[datasets]]
    batchsize = 2
    is_reg = true
    resolution = [512, 512, 512]
    [[datasets.subsets]]
    image_dirr = "PICS"
    [[datasets.subsets]]
    image_dir = "DIR/picz"
    [[datasets]]
    resolution = "big"
    """
    assert problems(folder, text) == [
        "unknown key 'generall'. Did you mean 'general'?",
        "general: unknown key 'caption_extention'. Did you mean 'caption_extension'?",
        "datasets[0]: unknown key 'batchsize'. Did you mean 'batch_size'?",
        "datasets[0]: is_reg cannot stand here; it belongs in [[datasets.subsets]]",
        "datasets[0]: resolution expects a whole number or [width, height], got [512, 512, 512]",
        "datasets[0].subsets[0]: unknown key 'image_dirr'. Did you mean 'image_dir'?",
        "datasets[0].subsets[0]: image_dir is missing (or metadata_file, shards or parquet)",
        f"datasets[0].subsets[1]: image_dir {folder}/picz does not exist. Did you mean {folder}/pics?",
        "datasets[1]: resolution expects a whole number or [width, height], got 'big'",
        "datasets[1]: no [[datasets.subsets]] is given: add one with image_dir or metadata_file",
    ]


def test_missing_image_dir_names_the_nearest_folder(folder: Path) -> None:
    (line,) = problems(folder, MINIMAL.replace("PICS", "DIR/zzz/deeper"))
    assert line.endswith(f"image_dir {folder}/zzz/deeper does not exist. The nearest folder that exists is {folder}")
    (line,) = problems(folder, MINIMAL.replace("PICS", "DIR/meta.json"))
    assert line.endswith("meta.json is a file; a folder is needed")


def test_syntax_errors_name_file_and_line(folder: Path) -> None:
    (line,) = problems(folder, "[[datasets]]\nresolution = 128 128\n")
    assert "data.toml, line 2 is not valid TOML" in line
    (line,) = problems(folder, '{\n"datasets": [\n', name="data.json")
    assert "data.json, line 3 is not valid JSON" in line
    (line,) = problems(folder, "[]", name="data.json")
    assert "expects an object with 'datasets', got a list" in line


def test_missing_file(tmp_path: Path) -> None:
    for name in ("none.toml", "none.json"):
        with pytest.raises(UserError, match=f"--dataset_config: .*{name} does not exist"):
            load_dataset_config(DataOptions(dataset_config=str(tmp_path / name)), bucket_step=64)


def test_no_dataset_at_all(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset_config(DataOptions(), bucket_step=64)
    assert len(caught.value.problems) == 1
    assert "--dataset_config" in caught.value.problems[0] and "--train_data_dir" in caught.value.problems[0]
    assert problems(folder, "[general]\n") == [
        "no [[datasets]] is given: add one with [[datasets.subsets]] and image_dir"
    ]


def test_bucket_rules(folder: Path) -> None:
    bucket = MINIMAL.replace("resolution = 512", "resolution = 512\nenable_bucket = true\n{}")
    cases = {
        "bucket_reso_steps = 48": "datasets[0]: bucket_reso_steps must be a multiple of 64 for this model, got 48",
        "min_bucket_reso = 1088": "datasets[0]: min_bucket_reso 1088 is larger than max_bucket_reso 1024",
        "min_bucket_reso = 640": "datasets[0]: min_bucket_reso 640 is larger than the resolution: give at most 512",
        "max_bucket_reso = 448": "datasets[0]: max_bucket_reso 448 is smaller than the resolution: give at least 512",
    }
    for line, text in cases.items():
        assert problems(folder, bucket.format(line)) == [text]
    load(folder, bucket.format("min_bucket_reso = 520"))  # counts as 512, rounded to the steps
    load(folder, bucket.format("bucket_reso_steps = 48"), bucket_step=16)
    load(folder, MINIMAL, bucket_reso_steps=48)  # no buckets: no steps


def test_metadata_file_makes_caption_keys_useless(folder: Path) -> None:
    text = MINIMAL.replace(
        "image_dir = ", "caption_extension = '.txt'\nclass_tokens = 'x'\nmetadata_file = 'DIR/meta.json'\nimage_dir = "
    )
    assert problems(folder, text) == [
        f"datasets[0].subsets[0]: {key} has no effect with metadata_file: its captions stand in that file"
        for key in ("class_tokens", "caption_extension")
    ]


def test_masked_loss_needs_masks(folder: Path) -> None:
    assert problems(folder, MINIMAL, masked_loss=True) == [
        "--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask = true"
    ]
    load(folder, MINIMAL + "alpha_mask = true\n", masked_loss=True)
    assert problems(folder, MINIMAL, conditioning_data_dir="x") == [
        "--conditioning_data_dir has no effect without --task edit or --masked_loss"
    ]


def test_masks_of_the_command_line_are_not_for_regularisation(folder: Path) -> None:
    text = MINIMAL + "[[datasets.subsets]]\nimage_dir = 'PICS'\nis_reg = true\n"
    (dataset,) = load(folder, text, masked_loss=True, conditioning_data_dir=str(folder / "masks"))
    assert [s.conditioning_data_dir for s in dataset.subsets] == [str(folder / "masks"), None]


def test_cached_latents_cannot_vary(folder: Path) -> None:
    for cache in (CacheOptions(cache_latents=True), CacheOptions(cache_latents_to_disk=True)):
        (line,) = problems(folder, MINIMAL + "color_aug = true\nflip_aug = true\n", cache=cache)
        assert line.startswith("color_aug cannot vary pictures that --cache_latents encodes once")
        (line,) = problems(folder, MINIMAL, random_crop=True, cache=cache)
        assert line.startswith("random_crop cannot vary")
    load(folder, MINIMAL + "flip_aug = true\n", cache=CacheOptions(cache_latents=True))
    load(folder, MINIMAL + "color_aug = true\n", cache=CacheOptions())


def test_folder_form_mistakes(tmp_path: Path) -> None:
    (tmp_path / "train" / "dog").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        load_dataset_config(
            DataOptions(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "regg")), bucket_step=64
        )
    assert caught.value.problems == [
        f"--train_data_dir: {tmp_path}/train needs subfolders named <repeats>_<class words>, such as 10_my dog; "
        "it has only dog",
        f"--reg_data_dir: {tmp_path}/regg does not exist. The nearest folder that exists is {tmp_path}",
        "--resolution is missing: give the training size, such as --resolution 512",
    ]


# ---- options ------------------------------------------------------------------------------------------------------


def test_options_that_have_no_effect_together() -> None:
    lines = list(DataOptions(dataset_config="a", train_data_dir="b", in_json="c").problems())
    assert lines == [
        f"--{name} has no effect with --dataset_config: give one of them, not both"
        for name in ("train_data_dir", "in_json")
    ]
    assert len(list(DataOptions(reg_data_dir="r").problems())) == 1
    assert len(list(DataOptions(train_data_dir="t", reg_data_dir="r", in_json="j").problems())) == 1
    assert len(list(DataOptions(min_bucket_reso=512, max_bucket_reso=256).problems())) == 1
    assert list(DataOptions(dataset_config="a").problems()) == []
    assert len(list(CacheOptions(skip_cache_check=True).problems())) == 1
    assert list(CacheOptions(skip_cache_check=True, cache_latents_to_disk=True).problems()) == []


def test_ranges_of_options() -> None:
    found = specs({"data": DataOptions, "cache": CacheOptions})
    for name, bad in {
        "caption_dropout_rate": "1.1", "validation_split": "-0.1", "train_batch_size": "0", "keep_tokens": "-1",
        "bucket_reso_steps": "0", "caption_variants": "0", "vae_batch_size": "-1", "resolution": "0",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            found[name].read(bad)
    assert found["resolution"].read("512,768") == (512, 768)
    assert found["caption_extension"].read("txt") == ".txt"


def test_defaults_of_options_equal_todays() -> None:
    golden = json.loads((Path(__file__).parents[1] / "data_files" / "data" / "cli_defaults.json").read_text())
    found = specs({"data": DataOptions, "cache": CacheOptions})
    ours = {"caption_variants", "cache_dir", "resolution_schedule"}
    assert set(found) - ours == set(golden)
    assert {name: found[name].default for name in golden} == golden


def test_cache_info_is_answered_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
    [[datasets]]
    resolution = 64
      [[datasets.subsets]]
      image_dir = "PICS"
      cache_info = true
    """
    with caplog.at_level(logging.INFO, logger="trainyard"):
        load(folder, text)
        load(folder, text.replace("cache_info = true", ""))
    assert caplog.messages == [f"{folder / 'data.toml'}: cache_info: always done now, in the cache folder"]


def test_repeats_that_the_folder_form_has_itself() -> None:
    (problem,) = DataOptions(train_data_dir="pics", dataset_repeats=5).problems()
    assert problem.startswith("--dataset_repeats has no effect with --train_data_dir")
    assert list(DataOptions(train_data_dir="pics", in_json="meta.json", dataset_repeats=5).problems()) == []


def test_shards_and_parquet(folder: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (folder / name).touch()
    text = MINIMAL.replace('image_dir = "PICS"', 'shards = "DIR/{a,b}.tar"\ncaption_column = "tags"')
    assert text != MINIMAL
    (dataset,) = load(folder, text)
    (subset,) = dataset.subsets
    assert subset.shard_pattern == ("shards", f"{folder}/{{a,b}}.tar") and subset.caption_column == "tags"
    (dataset,) = load(folder, text.replace("DIR/{a,b}.tar", "s3://bucket/{000..999}.tar"))

    def wrong(line: str) -> list[str]:
        own = MINIMAL.replace('image_dir = "PICS"', line)
        return [
            one.removeprefix("datasets[0].subsets[0]: ").replace(str(folder), "DIR") for one in problems(folder, own)
        ]

    assert wrong('shards = "DIR/{a..c}.tar"') == ["shards DIR/{a..c}.tar does not exist. Did you mean DIR/a.tar?"]
    assert wrong('shards = "DIR/{a,b,cc,d}.tar"') == [
        "shards DIR/cc.tar does not exist. Did you mean DIR/b.tar? (and 1 more of DIR/{a,b,cc,d}.tar)"
    ]
    assert wrong('parquet = "DIR"') == ["parquet DIR is a folder; a file is needed"]
    assert wrong('shards = "s3://x/{1..1000000}.tar"\nimage_column = "a"') == [
        "image_column has no effect with shards, where the ending of a file says what it is"
    ]
    assert wrong('shards = "DIR/{1..1000000}.tar"') == [
        "shards DIR/{1..1000000}.tar means 1,000,000 files; at most 100,000 are possible"
    ]
    assert wrong('shards = "zip::s3://x.zip"') == [
        "shards zip::s3://x.zip: a URL of one file system is needed, without ::"
    ]
    assert wrong(
        'shards = "DIR/a.tar"\nparquet = "DIR/b.tar"\nreference_data_dir = "DIR"\ncaption_extension = ".txt"'
    ) == [
        "parquet cannot stand beside shards: give one of them, and another subset for the other",
        "caption_extension has no effect with shards: captions are inside",
        "reference_data_dir has no effect with shards: references are inside",
    ]
    assert wrong('image_dir = "DIR/pics"\nmask_column = "m"\ncaption_column = "c"') == [
        "caption_column has no effect without shards or parquet",
        "mask_column has no effect without parquet",
    ]
