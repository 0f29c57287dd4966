"""`pipeline.describe`: the numbers of a card without weights, against timm's own run on the CPU."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.flop_counter import FlopCounterMode

from pipeline import describe as module
from pipeline.describe import check_model_name, describe
from pipeline.errors import UsageError

# model: params, GMACs, M activations, resize, crop, tokens, feature maps. Measured with timm 1.0.31; GMACs and
# activations are those of timm's results/benchmark-infer-amp-nchw-pt291-*.csv (there with the norms' few MACs).
SEEDS: dict[str, tuple[float, float, float, int, int, list[int], list[list[int]]]] = {
    "pit_ti_224": (4.847, 0.699, 6.19, 248, 224, [1, 1, 256], [[64, 27, 27], [128, 14, 14], [256, 7, 7]]),
    "pit_xs_224": (10.619, 1.395, 7.71, 248, 224, [1, 1, 384], [[96, 27, 27], [192, 14, 14], [384, 7, 7]]),
    "pit_s_224": (23.462, 2.871, 11.56, 248, 224, [1, 1, 576], [[144, 27, 27], [288, 14, 14], [576, 7, 7]]),
    "pit_b_224": (73.765, 12.402, 32.94, 248, 224, [1, 1, 1024], [[256, 31, 31], [512, 16, 16], [1024, 8, 8]]),
    "pit_ti_distilled_224": (5.104, 0.705, 6.23, 248, 224, [1, 2, 256], [[64, 27, 27], [128, 14, 14], [256, 7, 7]]),
    "pit_xs_distilled_224": (11.004, 1.407, 7.76, 248, 224, [1, 2, 384], [[96, 27, 27], [192, 14, 14], [384, 7, 7]]),
    "pit_s_distilled_224": (24.039, 2.897, 11.64, 248, 224, [1, 2, 576], [[144, 27, 27], [288, 14, 14], [576, 7, 7]]),
    "pit_b_distilled_224": (
        74.790,
        12.482,
        33.07,
        248,
        224,
        [1, 2, 1024],
        [[256, 31, 31], [512, 16, 16], [1024, 8, 8]],
    ),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k": (15.253, 4.364, 15.87, 269, 256, [1, 257, 256], [[256, 16, 16]] * 3),
    "convit_base.fb_in1k": (86.540, 17.505, 31.77, 256, 224, [1, 197, 768], [[768, 14, 14]] * 3),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (86.531, 17.564, 23.90, 248, 224, [1, 197, 768], [[768, 14, 14]] * 3),
}

FAMILIES = [
    "mobilenetv3_small_050",  # the embedding comes after a convolution of the head: 1024, num_features 288
    "vgg11",  # the embedding is 4096, num_features 512
    "swin_tiny_patch4_window7_224",  # NHWC tokens and maps
    "mambaout_femto",  # NHWC maps
    "crossvit_tiny_240",  # a list of tokens
    "coat_tiny",  # a list of tokens
    "convnext_atto",
    "resnet18",
    "efficientvit_b0",
    "levit_128s",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",  # no classes: its logits are the embedding
    "naflexvit_base_patch16_gap",
    "test_nfnet",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The forwards here are small: several threads on busy cores only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def card_of(name: str) -> dict[str, Any]:
    return describe(name)


def shape(tokens: Any) -> list[Any]:
    return [list(part.shape) for part in tokens] if isinstance(tokens, (list, tuple)) else list(tokens.shape)


@pytest.mark.parametrize("name", SEEDS)
def test_the_seed_models_have_the_numbers_of_their_cards(name: str) -> None:
    params_m, gmacs, activations_m, resize, crop, tokens, features = SEEDS[name]
    card = describe(name)
    assert (card["params_m"], card["gmacs"], card["activations_m"]) == (params_m, gmacs, activations_m)
    assert (card["resize"], card["input_size"]) == (resize, [3, crop, crop])
    assert (card["tokens"], card["features"]) == (tokens, features)
    assert (card["embedding_dim"], card["classes"]) == (tokens[-1], 1000)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_preprocessing_are_those_of_a_real_forward(name: str) -> None:
    card = card_of(name)
    model = timm.create_model(name).eval()
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    image = torch.zeros(1, *config["input_size"])
    with torch.no_grad():
        tokens = model.forward_features(image)
        assert card["embedding_dim"] == model.forward_head(tokens, pre_logits=True).shape[1] == model.head_hidden_size
        assert model.forward_head(tokens).shape[1] == (card["classes"] or card["embedding_dim"])
    assert card["tokens"] == shape(tokens)
    assert {key: card[key] for key in ("crop_pct", "interpolation")} == {
        key: config[key] for key in ("crop_pct", "interpolation")
    }
    assert (tuple(card["mean"]), tuple(card["std"])) == (config["mean"], config["std"])


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_have_the_channels_and_strides_that_timm_declares(name: str) -> None:
    card = card_of(name)
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    assert [shape[0] for shape in card["features"]] == model.feature_info.channels()
    sides = [shape[1] for shape in card["features"]]
    for side, stride in zip(sides, model.feature_info.reduction(), strict=True):
        assert abs(card["input_size"][1] / stride - side) < 1


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "convit_tiny"]
)
def test_multiply_adds_are_half_of_the_flops_that_torch_counts(name: str) -> None:
    """`FlopCounterMode` counts fused attention too; it only fails on PiT."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        timm.create_model(name).eval()(torch.zeros(1, 3, 224, 224))
    assert card_of(name)["gmacs"] == round(flops.get_total_flops() / 2e9, 3)


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_384", "pit_ti_224"])
def test_resize_is_the_size_of_timms_own_transform(name: str) -> None:
    config = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    assert describe(name)["resize"] == create_transform(**config).transforms[0].size


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", [384, 384]),
        ("vit_base_patch16_sapiens2.fb", [1024, 768]),
    ],
)
def test_squashed_images_give_both_sides(name: str, expected: list[int]) -> None:
    card = describe(name)
    config = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    squashed = create_transform(**config).transforms[0](Image.new("RGB", (640, 200)))
    assert card["resize"] == expected == [squashed.height, squashed.width]
    assert card["input_size"][1:] == list(config["input_size"][1:])


@pytest.mark.parametrize("name", ["mobilenetv5_300m_enc", "qwen3_vit_88m_enc"])
def test_an_encoder_without_a_head_has_no_embedding(name: str) -> None:
    card = describe(name)
    assert (card["embedding_dim"], card["classes"]) == (None, 0)
    assert card["features"]


def test_every_key_is_there_and_json_keeps_it() -> None:
    card = describe("pit_ti_224")
    assert json.loads(json.dumps(card)) == card
    assert list(card)[:7] == ["model", "params_m", "gmacs", "activations_m", "input_size", "resize", "crop_pct"]
    assert list(card)[7:] == ["interpolation", "mean", "std", "embedding_dim", "classes", "tokens", "features"]


def test_nothing_global_changes() -> None:
    """The random state, the default device, the gradient mode and the choice of attention stay as they were."""

    def state() -> tuple[Any, ...]:
        cuda = torch.backends.cuda
        sdp = (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
        fused = (timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True))
        grad = (torch.is_grad_enabled(), torch.get_default_device(), torch.get_default_dtype())
        return sdp, fused, grad, torch.get_rng_state().tolist(), random.getstate()

    before = state()
    describe("vit_pwee_patch16_reg1_gap_256.sbb_in1k")
    module._on_meta_or_cpu(lambda: torch.rand(3).sum().item())  # on meta this fails, so that the CPU has its turn
    assert state() == before


def test_what_cannot_run_on_meta_runs_on_the_cpu() -> None:
    assert module._on_meta_or_cpu(lambda: torch.full((2,), 3.0).sum().item()) == 6.0


def test_a_model_of_a_folder_needs_its_config_only(tmp_path: Path) -> None:
    config = {
        "architecture": "pit_ti_224",
        "num_classes": 7,
        "model_args": {"num_classes": 7},
        "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.8, "num_classes": 7, "mean": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = describe(f"local-dir:{tmp_path}")
    assert (card["classes"], card["resize"], card["mean"]) == (7, 280, [0.5, 0.5, 0.5])
    assert card["embedding_dim"] == 256


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet19", "nearest names: resnet18"),
        ("pit_b_244", "pit_b_224"),
        ("pit_b_224.no_such_tag", "pit_b_224.in1k"),
        ("vit_base_patch16_224.augreg", "vit_base_patch16_224.augreg_in1k"),
        ("convit_base.fb_in1", "nearest names: convit_base.fb_in1k"),
        ("zzzzzzzz", "nearest names: none"),
        ("", "nearest names"),
        ("timm/resnet18", "hf-hub:timm/resnet18"),
        ("ftp:resnet18", "valid sources: hf-hub, local-dir"),
        ("hf-hub:too/many/slashes", "Repo id must be"),
        ("local-dir:/no/such/folder", "/no/such/folder/config.json"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_model_name(name)
    assert said in str(caught.value)
    with pytest.raises(UsageError):
        describe(name)


@pytest.mark.parametrize("text", ["{", '{"model": "resnet18"}', '{"architecture": "resnet19"}'])
def test_a_folder_with_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError):
        check_model_name(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "pit_b_224", "convit_base.fb_in1k", "tv_resnet34"])
def test_known_names_pass(name: str) -> None:
    """Deprecated names (`tv_resnet34`) too: timm still builds them."""
    check_model_name(name)
