"""Other input sizes, channel and class counts: the weights that timm's user would expect, or a refusal."""

from pathlib import Path

import oracle
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch.nn.functional import interpolate

from pipeline.architecture import build
from pipeline.backbone import facts_of, preprocessing_of
from pipeline.config import Adapt
from pipeline.errors import UsageError
from pipeline.weights import load_module, load_staged, sha256, stage


def trained(model: str) -> torch.nn.Module:
    """The seeded model with numbers in BEiT's tables of relative positions, which start as zeros."""
    net = oracle.module(model)
    generator = torch.Generator().manual_seed(4)
    for name, weight in net.named_parameters():
        if name.endswith("relative_position_bias_table"):
            weight.data = torch.randn(weight.shape, generator=generator)
    return net


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory):
    """Model name → the URL of its seeded weights at its own size."""
    folder = tmp_path_factory.mktemp("weights")

    def save(model: str) -> str:
        path = folder / f"{model}.safetensors"
        if not path.exists():
            safetensors.torch.save_file(trained(model).state_dict(), path)
        return str(path)

    return save


def at(model: str, weights: str, *size: int) -> torch.nn.Module:
    return load_module(model, weights, Adapt(image_size=(size[0], size[-1])))


@pytest.mark.parametrize("model", ["pit_ti_224", "pit_ti_distilled_224", "convit_tiny", "beit_base_patch16_224"])
def test_the_models_own_size_changes_no_bit(model: str, stored) -> None:
    """Asking for the size that a model has gives the very weights, and so the same set."""
    assert sha256(at(model, stored(model), 224).state_dict()) == sha256(trained(model).state_dict())
    assert sha256(at(model, "random:0", 224).state_dict()) == sha256(oracle.shared(model).state_dict())


PITS = [("pit_ti_224", (320, 320)), ("pit_ti_distilled_224", (320, 320)), ("pit_ti_distilled_224", (192, 264))]


@pytest.mark.parametrize(("model", "size"), [*PITS, ("pit_b_224", (189, 259))])
def test_pit_at_another_size_has_interpolated_positions(model: str, size: tuple[int, int], stored) -> None:
    """Bicubic with antialias on the grid of patches, every other weight as it is; what timm itself cannot load."""
    ours, plain = at(model, stored(model), *size), oracle.module(model).state_dict()
    theirs = timm.create_model(model, img_size=size).eval()
    grid = theirs.patch_embed.grid_size
    plain["pos_embed"] = interpolate(plain["pos_embed"], grid, mode="bicubic", antialias=True, align_corners=False)
    theirs.load_state_dict(plain)
    x = torch.rand(1, 3, *size)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
    assert preprocessing_of(ours).input_size == (3, *size)


def test_convit_at_another_size_has_interpolated_positions(stored) -> None:
    """As PiT, on the flattened grid; its relative positions make themselves anew."""
    ours, plain = at("convit_tiny", stored("convit_tiny"), 320), oracle.module("convit_tiny").state_dict()
    grid = plain["pos_embed"].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    plain["pos_embed"] = interpolate(grid, (20, 20), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    theirs = timm.create_model("convit_tiny", img_size=320).eval()
    theirs.load_state_dict(plain)
    x = torch.rand(1, 3, 320, 320)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_a_file_of_another_size_wants_the_flag(tmp_path: Path) -> None:
    """Nothing is interpolated that nobody asked for: timm's filter would make 160 of 320 without a word."""
    torch.manual_seed(1)
    tuned = timm.create_model("test_vit", img_size=320).eval()
    safetensors.torch.save_file(tuned.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="were they made for --image-size"):
        load_module("test_vit", str(tmp_path / "w.safetensors"))


def test_relative_positions_of_another_grid_with_as_many_are_rearranged(stored) -> None:
    """BEiT's tables for 5 x 41 patches are as long as those for 14 x 14; timm's `set_input_size` is the oracle."""
    theirs = trained("beit_base_patch16_224")
    theirs.set_input_size(img_size=(80, 656))
    ours = at("beit_base_patch16_224", stored("beit_base_patch16_224"), 80, 656).state_dict()
    assert all(torch.allclose(ours[k], v, rtol=0, atol=1e-5) for k, v in theirs.state_dict().items())


RESIZED = [(m, s) for m in ("test_vit", "deit_tiny_distilled_patch16_224") for s in ((320, 320), (96, 416), (80, 320))]


@pytest.mark.parametrize(("model", "size"), [*RESIZED, ("beit_base_patch16_224", (96, 416))])
def test_timms_own_resizing_is_ours(model: str, size: tuple[int, int], stored) -> None:
    """Where timm can resize, the same bits; also with as many patches in another shape, which timm's loader mistakes.

    test_vit has 10 x 10 patches of 16: 80 x 320 has as many. timm's `set_input_size` gets these right.
    """
    if model != "test_vit":
        size = (size[0] // 80 * 112, size[1] // 80 * 112)  # 224 has 14 x 14: 112 x 448 has as many
    theirs = trained(model)
    theirs.set_input_size(img_size=size)
    ours = at(model, stored(model), *size).state_dict()
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.allclose(ours[k], expected[k], rtol=0, atol=1e-5) for k in expected)


def test_convolutional_models_take_any_size(stored) -> None:
    """Nothing to interpolate: the weights stay, the images are larger."""
    ours = at("resnet10t", stored("resnet10t"), 200, 301)
    assert sha256(ours.state_dict()) == sha256(oracle.module("resnet10t").state_dict())
    assert facts_of(ours, "resnet10t", ("tokens",)).tensors[0].shapes == ((512, 7, 10),)


@pytest.mark.parametrize(
    ("model", "size", "why"),
    [
        ("convit_tiny", (112, 448), "square grid only"),
        ("convit_tiny", (230, 230), "do not cover 230; 224 or 240 would do"),
        ("convit_base.fb_in1k", (8, 8), "do not cover 8; 16 or 32 would do"),
        ("pit_ti_224", (225, 231), "do not cover 225; 224 or 232 would do"),
        ("pit_b_224", (224, 228), "patches of 14 pixels every 7, which do not cover 228; 224 or 231 would do"),
        ("vit_pwee_patch16_reg1_gap_256", (250, 256), "240 or 256 would do"),
        ("beit_base_patch16_224", (224, 225), "224 or 240 would do"),
        ("swin_tiny_patch4_window7_224", (225, 224), "224 or 228 would do"),
        ("levit_128s", (256, 256), "do not fit LevitDistilled with image size 256x256"),
        ("crossvit_tiny_240", (120, 480), "pos_embed_0 belongs to crossvit_tiny_240's own grid of patches"),
        ("gmlp_ti16_224", (112, 448), "belongs to gmlp_ti16_224's own grid"),
        ("gcvit_xxtiny", (8, 8), "cannot be built with image size 8x8"),
    ],
)
def test_a_size_that_cannot_be_right_is_refused(model: str, size: tuple[int, int], why: str, stored) -> None:
    """PiT takes 225 x 231 without a word, ConViT 112 x 448, and both are wrong: exit 2, with sizes that would do."""
    weights = stored(model) if model in ("levit_128s", "crossvit_tiny_240", "gmlp_ti16_224") else "random:0"
    with pytest.raises(UsageError, match=why):
        at(model, weights, *size)


def test_a_size_that_only_the_forward_pass_refuses_is_told_before_any_work() -> None:
    """What the constructor takes and the model cannot compute is found on one blank image."""
    with pytest.raises(UsageError, match="takes no plain batch of 3x100x384 images"):
        facts_of(build("naflexvit_base_patch16_gap", Adapt(image_size=(100, 384))), "naflexvit_base_patch16_gap")


def test_a_file_made_at_the_size_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    """Fine-tuned at 320: its positions are of that grid already."""
    torch.manual_seed(1)
    tuned = timm.create_model("pit_ti_224", img_size=320).eval()
    safetensors.torch.save_file(tuned.state_dict(), tmp_path / "w.safetensors")
    ours = at("pit_ti_224", str(tmp_path / "w.safetensors"), 320)
    assert sha256(ours.state_dict()) == sha256(tuned.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("model", ["test_vit", "resnet10t"])
def test_the_first_convolution_is_adapted_to_the_channels(model: str, channels: int, stored) -> None:
    """As timm does for `pretrained`; every other weight stays; statistics are the mean over the colours."""
    ours = load_module(model, stored(model), Adapt(in_chans=channels))
    plain = oracle.module(model)
    first = f"{plain.pretrained_cfg['first_conv']}.weight"
    state = plain.state_dict()
    assert torch.equal(ours.state_dict()[first], adapt_input_conv(channels, state[first]))
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items() if k != first)
    preprocessing = preprocessing_of(ours)
    assert preprocessing.input_size[0] == len(preprocessing.mean) == len(preprocessing.std) == channels


def test_random_weights_are_timms_own_for_what_was_asked() -> None:
    """random:SEED is timm's initialisation of the architecture that is asked for, not of another one adapted."""
    adapt = Adapt(image_size=(192, 192), in_chans=1, num_classes=10)
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", img_size=192, in_chans=1, num_classes=10)
    assert sha256(load_module("test_vit", "random:3", adapt).state_dict()) == sha256(theirs.state_dict())


@pytest.mark.parametrize("model", ["test_vit", "pit_ti_distilled_224", "levit_128s", "resnet10t", "mambaout_femto"])
def test_a_heads_class_count_comes_with_the_weights(model: str, tmp_path: Path) -> None:
    """A file of a fine-tuned model brings its own number of classes, in both heads where there are two."""
    torch.manual_seed(2)
    tuned = timm.create_model(model, num_classes=7)
    safetensors.torch.save_file(tuned.state_dict(), tmp_path / "w.safetensors")
    ours = load_module(model, str(tmp_path / "w.safetensors"))
    assert sha256(ours.state_dict()) == sha256(tuned.state_dict())
    facts = facts_of(ours, model)
    assert (facts.classes, facts.labels_source) == (7, "none")


@pytest.mark.parametrize("model", ["test_vit", "pit_ti_distilled_224", "mobilenetv3_small_050"])
def test_num_classes_0_drops_the_head_and_nothing_else(model: str, stored) -> None:
    """The embedding is the same, classes are gone; no other missing key is forgiven."""
    ours, plain = load_module(model, stored(model), Adapt(num_classes=0)), oracle.module(model)
    x = torch.rand(1, *preprocessing_of(plain).input_size)
    with torch.inference_mode():
        embeddings = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (ours, plain)]
    assert torch.equal(*embeddings)
    assert facts_of(ours, model).classes == 0


def test_a_checkpoint_without_a_head_names_the_flag(tmp_path: Path) -> None:
    """Self-supervised weights have no classifier: the message says how to go on, and going on works."""
    state = {k: v for k, v in oracle.module("test_vit").state_dict().items() if not k.startswith("head.")}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"head.weight \(--num-classes 0 leaves the head out\)"):
        load_module("test_vit", str(tmp_path / "w.safetensors"))
    assert load_module("test_vit", str(tmp_path / "w.safetensors"), Adapt(num_classes=0)).num_classes == 0


def test_another_class_count_than_the_weights_is_refused(stored) -> None:
    """timm would leave the head at random without a word."""
    with pytest.raises(UsageError, match=r"do not fit .* with classes 10: other shapes: head"):
        load_module("test_vit", stored("test_vit"), Adapt(num_classes=10))


def test_an_actor_builds_the_same_adapted_model(stored, own_cache: Path) -> None:
    """What was adapted on the driver is staged as it is and loaded strictly."""
    adapt = Adapt(image_size=(320, 320), in_chans=1)
    ours = load_module("pit_ti_224", stored("pit_ti_224"), adapt)
    staged = load_staged("pit_ti_224", stage(ours, sha256(ours.state_dict())), adapt)
    x = torch.rand(1, 1, 320, 320)
    with torch.inference_mode():
        assert torch.equal(ours(x), staged(x))
    assert preprocessing_of(staged) == preprocessing_of(ours)


def test_positions_with_a_prefix_keep_it(stored) -> None:
    """Class and distillation tokens have positions of their own, which are no part of the grid."""
    model = "deit_tiny_distilled_patch16_224"
    ours, plain = at(model, stored(model), 112, 448).state_dict()["pos_embed"], oracle.module(model).pos_embed
    assert torch.equal(ours[:, :2], plain[:, :2])
    assert torch.equal(ours, resample_abs_pos_embed(plain, [7, 28], [14, 14], num_prefix_tokens=2))


def test_positions_are_moved_once_also_where_the_filter_has_work(tmp_path: Path) -> None:
    """A flattened patch embedding brings timm's filter in; 80 x 320 has as many patches as 160 x 160."""
    theirs = oracle.module("test_vit")
    state = theirs.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    theirs.set_input_size(img_size=(80, 320))
    ours = at("test_vit", str(tmp_path / "w.safetensors"), 80, 320).state_dict()
    assert all(torch.allclose(ours[k], v, rtol=0, atol=1e-6) for k, v in theirs.state_dict().items())
