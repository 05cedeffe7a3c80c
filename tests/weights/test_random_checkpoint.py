# SPDX-License-Identifier: Apache-2.0
"""tools/make_random_checkpoint.py: both layouts hold the same weights, and load."""

import pytest
import torch

from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from tools.make_random_checkpoint import main


@pytest.mark.parametrize("version", [1, 2])
def test_both_layouts_hold_the_same_weights(tmp_path, capsys, version):
    main(["--tiny", "--version", str(version), "--output", str(tmp_path)])
    paths = capsys.readouterr().out.split()
    assert paths == [str(tmp_path / "model.safetensors"), str(tmp_path / "diffusers")]
    states = []
    for path in paths:
        sd = StableDiffusion(SDOptions(pretrained_model_name_or_path=path, v2=version == 2))
        sd.check()
        modules = (
            sd.load_denoiser(None, "cpu"),
            sd.load_vae(None, "cpu"),
            sd.load_text_encoder("clip", torch.float32, "cpu"),
        )
        states.append({f"{i}.{n}": t for i, m in enumerate(modules) for n, t in m.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {t.dtype for n, t in states[0].items() if n.startswith("0.")} == {torch.float16}
    with torch.no_grad():
        context = sd.encode_text(sd.tokenize(["a red cat"]), {"clip": modules[2]})
        found = sd.predict(modules[0].float(), torch.randn(1, 4, 8, 8), torch.tensor([5]), context, None)
    assert torch.isfinite(found).all() and found.std() > 0
