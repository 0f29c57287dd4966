"""`pipeline.describe`: the numbers of a card without weights, against timm's own run on the CPU."""

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.describe import _print
from pipeline import describe as module
from pipeline.describe import check_model_name, describe
from pipeline.errors import UsageError


class Seed(NamedTuple):
    """Measured with timm 1.0.31. `weighted`: without the products of two activations."""

    params: int
    gmacs: float
    activations_m: float
    weighted: tuple[float, float]
    tokens: list[int]
    features: list[list[int]]
    resize: int = 248
    crop_pct: float = 0.9
    crop: int = 224


def pit(*channels: int, sides: tuple[int, ...] = (27, 14, 7)) -> list[list[int]]:
    return [[count, side, side] for count, side in zip(channels, sides, strict=True)]


# GMACs and activations are also those of timm's results/benchmark-infer-amp-nchw-pt291-cu128-4090.csv, and `weighted`
# of PiT and BEiT those of benchmark-infer-amp-nchw-pt210-cu121-rtx3090.csv (there with the norms' few MACs).
SEEDS = {
    "pit_ti_224": Seed(4_847_272, 0.699, 6.19, (0.498, 2.75), [1, 1, 256], pit(64, 128, 256)),
    "pit_xs_224": Seed(10_618_888, 1.395, 7.71, (1.093, 4.12), [1, 1, 384], pit(96, 192, 384)),
    "pit_s_224": Seed(23_461_912, 2.871, 11.56, (2.418, 6.18), [1, 1, 576], pit(144, 288, 576)),
    "pit_b_224": Seed(73_764_840, 12.402, 32.94, (10.540, 16.60), [1, 1, 1024], pit(256, 512, 1024, sides=(31, 16, 8))),
    "pit_ti_distilled_224": Seed(5_104_336, 0.705, 6.23, (0.503, 2.77), [1, 2, 256], pit(64, 128, 256)),
    "pit_xs_distilled_224": Seed(11_003_984, 1.407, 7.76, (1.103, 4.15), [1, 2, 384], pit(96, 192, 384)),
    "pit_s_distilled_224": Seed(24_039_056, 2.897, 11.64, (2.441, 6.22), [1, 2, 576], pit(144, 288, 576)),
    "pit_b_distilled_224": Seed(
        74_790_096, 12.482, 33.07, (10.613, 16.67), [1, 2, 1024], pit(256, 512, 1024, sides=(31, 16, 8))
    ),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k": Seed(
        15_253_480, 4.364, 15.87, (3.823, 10.59), [1, 257, 256], [[256, 16, 16]] * 3, 269, 0.95, 256
    ),
    "convit_base.fb_in1k": Seed(
        86_540_040, 17.505, 31.77, (16.796, 22.57), [1, 197, 768], [[768, 14, 14]] * 3, 256, 0.875
    ),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": Seed(
        86_530_984, 17.564, 23.90, (16.849, 16.49), [1, 197, 768], [[768, 14, 14]] * 3
    ),
}

# M parameters, GMACs, M activations as cards at https://huggingface.co/timm/ print them.
CARDS = {
    "pit_b_224.in1k": ("73.8", "12.4", "32.9"),
    "pit_ti_distilled_224.in1k": ("5.1", "0.7", "6.2"),
    "pit_s_distilled_224.in1k": ("24.0", "2.9", "11.6"),
    "convit_base.fb_in1k": ("86.5", "17.5", "31.8"),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": ("86.5", "17.6", "23.9"),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k": ("15.3", "4.4", "15.9"),  # before revision abd3b88
    "vit_wee_patch16_reg1_gap_256.sbb_in1k": ("13.4", "3.8", "13.9"),  # revision 152c378
}
CARDS_WITHOUT_ATTENTION = {
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k": ("15.3", "3.8"),
    "vit_wee_patch16_reg1_gap_256.sbb_in1k": ("13.4", "3.4", "9.3"),  # revision 55ad730
}

aten = torch.ops.aten

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
def test_the_seed_models_have_their_numbers(name: str) -> None:
    seed, card = SEEDS[name], card_of(name)
    assert card["params_m"] == round(seed.params / 1e6, 3)
    assert (card["gmacs"], card["activations_m"]) == (seed.gmacs, seed.activations_m)
    assert (card["gmacs_without_attention"], card["activations_m_without_attention"]) == seed.weighted
    assert (card["resize"], card["input_size"]) == (seed.resize, [3, seed.crop, seed.crop])
    assert (card["crop_pct"], card["interpolation"]) == (seed.crop_pct, "bicubic")
    assert (card["tokens"], card["features"]) == (seed.tokens, seed.features)
    assert (card["embedding_dim"], card["classes"]) == (seed.tokens[-1], 1000)


@pytest.mark.parametrize(
    ("name", "printed", "suffix"),
    [(*card, "") for card in CARDS.items()]
    + [(*card, "_without_attention") for card in CARDS_WITHOUT_ATTENTION.items()],
)
def test_rounded_as_cards_print_them_the_numbers_are_the_cards(
    name: str, printed: tuple[str, ...], suffix: str
) -> None:
    """Some cards count attention's products, others do not, and some did at one time and not at another."""
    card = card_of(name)
    rounded = [f"{card[key]:.1f}" for key in ("params_m", f"gmacs{suffix}", f"activations_m{suffix}")]
    assert rounded[: len(printed)] == list(printed)


def test_a_note_tells_what_a_card_without_attentions_products_prints() -> None:
    (note,) = card_of("vit_pwee_patch16_reg1_gap_256.sbb_in1k")["notes"]
    assert "attention" in note
    assert "3.8 GMACs and 10.6 M activations instead of 4.4 and 15.9" in note
    assert card_of("resnet18")["notes"] == []


@pytest.mark.parametrize("name", ["pit_ti_distilled_224", "levit_128s"])
def test_the_note_on_two_heads_is_true(name: str) -> None:
    """timm gives the mean of what enters the two heads and the mean of what leaves them."""
    assert module.HEADS_NOTE in card_of(name)["notes"]
    model = timm.create_model(name).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(next(weight for weight in head.parameters() if weight.ndim == 2))
        head.register_forward_hook(lambda _, entered, left: seen.append((entered[0], left)))
    with torch.no_grad():
        tokens = model.forward_features(torch.rand(1, 3, 224, 224))
        embedding, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)
    entered, left = (torch.stack(both).mean(0) for both in zip(*seen, strict=True))
    assert torch.allclose(embedding, entered, atol=1e-6) and torch.allclose(logits, left, atol=1e-6)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_one_head_is_no_note_and_missing_feature_maps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("features_only not implemented")

    assert module.HEADS_NOTE not in card_of("pit_ti_224")["notes"]
    monkeypatch.setattr(module, "_feature_shapes", none)
    card = describe("resnet18")
    assert (card["features"], card["notes"]) == ([], [module.NO_FEATURES])


def test_the_verbs_text_ends_with_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    """A number a line, shapes without brackets, then each note on its own line."""
    card = {**card_of("pit_ti_distilled_224"), "embedding_dim": None}
    _print(card)
    numbers, notes = capsys.readouterr().out.split("\n\n")
    assert notes.splitlines() == card["notes"]
    shown = dict(line.split(maxsplit=1) for line in numbers.splitlines())
    assert list(shown) == list(card)[:-1]
    assert (shown["gmacs"], shown["gmacs_without_attention"]) == ("0.705", "0.503")
    assert (shown["input_size"], shown["mean"]) == ("3×224×224", "0.485, 0.456, 0.406")
    assert (shown["features"], shown["embedding_dim"]) == ("64×27×27 · 128×14×14 · 256×7×7", "none")
    _print({**card, "features": [], "notes": []})
    assert capsys.readouterr().out.endswith("features  none\n")


@pytest.mark.by_model
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_preprocessing_are_those_of_a_real_forward(name: str) -> None:
    card = card_of(name)
    model = oracle.shared(name)
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
    """`FlopCounterMode` counts fused attention as such and written-out attention as `bmm`; it only fails on PiT."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        timm.create_model(name).eval()(torch.zeros(1, 3, 224, 224))
    by_op = flops.get_flop_counts()["Global"]
    weighted = sum(by_op.get(op, 0) for op in (aten.convolution, aten.mm, aten.addmm))
    card = card_of(name)
    assert card["gmacs"] == round(flops.get_total_flops() / 2e9, 3)
    assert card["gmacs_without_attention"] == round(weighted / 2e9, 3)


def test_a_product_with_a_parameter_looked_up_and_resized_is_no_attention() -> None:
    """SAM's relative positions: M activations of timm's results/benchmark-infer-amp-nchw-pt210-cu121-rtx3090.csv."""
    assert card_of("samvit_base_patch16_224")["activations_m_without_attention"] == 17.20


WEIGHTED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "parameter": lambda x, w: x @ w,
    "parameter on the left": lambda x, w: w @ x.transpose(1, 2),
    "linear with a bias": lambda x, w: F.linear(x, w, w[0]),
    "transposed part": lambda x, w: x[0] @ w.detach()[:2].T,
    "cast": lambda x, w: x.double() @ w.double(),
    "copied for each image": lambda x, w: torch.bmm(x, w.expand(2, 4, 4).contiguous()),
    "looked up": lambda x, w: x @ w[torch.arange(4)],
    "normed": lambda x, w: x @ (w / w.norm()),
    "einsum": lambda x, w: torch.einsum("bnc,dc->bdn", x, w),
    "constant": lambda x, w: x @ torch.ones(4, 4),
    "convolution by activations": lambda x, w: F.conv1d(x, x),
}
ATTENTION: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "fused": lambda x, w: F.scaled_dot_product_attention(x, x, x),
    "written out": lambda x, w: ((x + w[0]) @ x.transpose(1, 2)).softmax(-1) @ x,
    "einsum of two": lambda x, w: torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", x, x), x),
    "filled in place": lambda x, w: torch.zeros(2, 5, 4).copy_(x) @ x.transpose(1, 2) @ x,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*WEIGHTED, *ATTENTION])
def test_attention_is_a_product_of_two_activations(name: str, device: str) -> None:
    """However its weight is made of parameters and constants, a product with one always counts."""
    with torch.device(device), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        image, weight = torch.ones(2, 5, 4), torch.nn.Parameter(torch.ones(4, 4))
        with module._Products(image) as run:
            (WEIGHTED | ATTENTION)[name](image * 2, weight)
    assert [product.is_attention for product in run.products] == ([True, True] if name in ATTENTION else [False])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_projected_learned_query_is_an_activation(device: str) -> None:
    with torch.device(device), torch.no_grad():
        image, weight = torch.ones(5, 4), torch.nn.Parameter(torch.ones(4, 4))
        with module._Products(image) as run:
            torch.addmm(weight[0], weight[:1], weight) @ image.T
    assert run.products == [(16, 4, False), (20, 5, True)]


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_384", "pit_ti_224"])
def test_resize_is_the_size_of_timms_own_transform(name: str) -> None:
    config = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    assert card_of(name)["resize"] == create_transform(**config).transforms[0].size


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
    card = card_of("pit_ti_224")
    assert json.loads(json.dumps(card)) == card
    costs = ["gmacs", "activations_m", "gmacs_without_attention", "activations_m_without_attention"]
    assert list(card)[:8] == ["model", "params_m", *costs, "input_size", "resize"]
    assert list(card)[8:13] == ["crop_pct", "interpolation", "mean", "std", "embedding_dim"]
    assert list(card)[13:] == ["classes", "tokens", "features", "notes"]


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
