"""Every architecture that timm lists, held against timm's own numbers.

    python tests/families.py ['vit_*' …]     runs all of them, or those that match

On the meta device, shapes: the embedding against the model's `head_hidden_size`, tokens against `forward_features`,
maps against `features_only=True`. On the CPU also the values, with seeded weights.
"""

import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.architecture import build
from pipeline.backbone import Backbone, facts_of, preprocessing_of
from pipeline.errors import UsageError
from pipeline.features import heads_of, timms_maps

# The smallest of each module of timm. Those of more than 80 M parameters are looked at on the meta device.
SMALLEST = (
    *("test_convnext", "test_efficientnet", "test_vit", "test_nfnet", "test_mambaout", "test_byobnet", "test_resnet"),
    *("starnet_s050", "test_coatnet", "test_vit_relpos", "dla46x_c", "edgenext_xx_small", "mobilenetv3_small_050"),
    *("ese_vovnet19b_slim_dw", "repghostnet_050", "efficientvit_m0", "ghostnet_050", "regnetx_002", "cspnext_tiny"),
    *("iformer_t", "cs3darknet_focus_s", "efficientvit_b0", "swiftformer_xs", "efficientformerv2_s0", "pvt_v2_b0"),
    *("fasternet_t0", "fastvit_t8", "lcnetv2_small", "inception_next_atto", "rexnet_100", "pit_ti_224", "repvit_m1"),
    *("coat_tiny", "eva02_tiny_patch14_224", "convit_tiny", "gmlp_ti16_224", "deit_tiny_distilled_patch16_224"),
    *("hgnetv2_b0", "shvit_s1", "cpubone_nano", "efficientvim_m1", "crossvit_tiny_240", "levit_128s", "densenet121"),
    *("dpn48b", "visformer_tiny", "csatv2", "resnetv2_18", "legacy_seresnet18", "poolformerv2_s12"),
    *("cait_xxs24_224", "gcvit_xxtiny", "tiny_vit_5m_224", "efficientformer_l1", "hrnet_w18_small", "lowformer_b0"),
    *("nest_tiny", "convmixer_768_32", "legacy_xception", "tnt_s_legacy_patch16_224", "inception_v3", "rdnet_tiny"),
    *("twins_svt_small", "mvitv2_tiny", "sam2_hiera_tiny", "hiera_tiny_224", "swin_tiny_patch4_window7_224"),
    *("swinv2_cr_tiny_224", "swinv2_tiny_window16_256", "davit_tiny", "focalnet_tiny_srf", "selecsls42", "tresnet_m"),
    *("nextvit_small", "inception_v4", "inception_resnet_v2", "sequencer2d_s", "xcit_nano_12_p8_224"),
)
LARGE = (
    *("mobilenetv5_base", "pnasnet5large", "samvit_base_patch16_224", "naflexvit_base_patch16_parfac_gap"),
    *("beit_base_patch16_224", "qwen3_vit_88m", "nasnetalarge", "vgg11", "gemma4_vit_167m", "deepseek_vit_412m"),
    *("volo_d1_224",),
)
# LSTMs: 23 s there, 3 on the CPU. And gemma4, which reads values, so that the CPU has to do: 90 s. Only by hand.
SLOW_ON_META = ("sequencer2d_s", "gemma4_vit_167m")


def wrong(name: str, device: str) -> str | None:
    """What differs from timm's own calls, or why the model is refused; None where all is equal."""
    # On meta a normal distribution has no values, and took a third of the time.
    unset = (
        patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)
        if device == "meta"
        else nullcontext()
    )
    try:
        with torch.device(device), torch.inference_mode(), unset:
            return _compared(name, values=device == "cpu")
    except UsageError as e:
        if device == "meta" and "meta tensors" in str(e):  # it reads values off a tensor, which meta has not
            return wrong(name, "cpu")
        return f"refused: {e}"


def _compared(name: str, values: bool) -> str | None:
    torch.manual_seed(0)
    module = build(name)
    heads = ("heads",) if len(heads_of(module)) > 1 else ()
    facts = facts_of(module, name, ("embedding", "tokens", "features", *heads))
    if facts.dim != getattr(module, "head_hidden_size", None):
        return f"embedding {facts.dim}, head_hidden_size {module.head_hidden_size}"
    images = torch.randint(0, 256, (1, *preprocessing_of(module).input_size), dtype=torch.uint8)
    x = Backbone(module, batch_size=1).normalize(images) if values else images.float()
    body = module.forward_features(x)
    if not values:
        wrapped = timms_maps(name)
    else:
        torch.manual_seed(0)  # the wrappers build the whole model first, so its weights are the same
        wrapped = timm.create_model(name, features_only=True).eval()
        shared = {k: v for k, v in module.state_dict().items() if k in wrapped.state_dict()}
        wrapped.load_state_dict(shared, strict=False)
    maps = wrapped(x)
    theirs = {"tokens": list(body) if isinstance(body, list | tuple) else [body]}
    theirs |= {f"feature_{i}": [m] for i, m in enumerate(maps)}
    columns = {f.column: f for f in facts.tensors if f.kind != "heads"}
    if columns.keys() != theirs.keys():
        return f"columns {sorted(columns)}, timm's {sorted(theirs)}"
    for column, parts in theirs.items():
        if columns[column].shapes != tuple(tuple(p.shape[1:]) for p in parts):
            return f"{column} {columns[column].shapes}, timm's {[tuple(p.shape[1:]) for p in parts]}"
    channels = tuple(wrapped.feature_info.channels())
    last = {"NHWC": -1, "NCHW": 0}
    found = tuple(f.shapes[0][last[f.layouts[0]]] for c, f in columns.items() if c != "tokens")
    if found != channels:
        return f"channels {found}, timm's {channels}"
    if values:
        got = Backbone(module, batch_size=1, tensors=facts.tensors)(images)
        if not torch.equal(got.embedding, module.forward_head(body, pre_logits=True).flatten(1)):
            return "another embedding"
        for f, flat in zip(facts.tensors, got.tensors, strict=True):
            if f.kind == "heads":
                mean = flat.view(-1, *f.shapes[0]).mean(1)
                if not torch.allclose(mean, module.forward_head(body), atol=1e-6):
                    return "the heads' mean is not timm's logits"
            if f.column in theirs:
                plain = torch.cat([p.flatten(1) for p in theirs[f.column]], 1).half()
                if not torch.equal(flat, plain):
                    return f"{f.column} differs by {(flat.float() - plain.float()).abs().max():.2g}"
    return None


def sweep(names: Iterable[str], device: str) -> dict[str, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: wrong(name, device) for name in names}


def share(found: dict[str, str | None]) -> str:
    good = sum(problem is None for problem in found.values())
    return f"{good} of {len(found)} architectures ({good / len(found):.2%}) give what timm gives"


if __name__ == "__main__":
    started, everything = time.monotonic(), {}
    for model in timm.list_models(sys.argv[1:] or "*"):
        everything |= sweep([model], "meta")
        if everything[model] is not None:
            print(f"{model}: {everything[model]}", flush=True)
    print(f"{share(everything)}; {time.monotonic() - started:.0f} s")
