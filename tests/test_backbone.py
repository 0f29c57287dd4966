"""The right vector, whatever the batch: timm's own calls are the oracle."""

import numpy as np
import oracle
import pytest
import torch
from timm.data import create_transform, resolve_data_config

from pipeline import engines
from pipeline.architecture import build
from pipeline.backbone import Backbone, facts_of, ranked, read_labels, resolve_device, resolve_precision
from pipeline.config import Adapt
from pipeline.engines import Eager
from pipeline.errors import NoRoom, UsageError
from pipeline.features import Body, Taps
from pipeline.images import Decoder

IMAGES = list(oracle.good_images().values())[:5]


def pixels(backbone: Backbone, images: list[bytes] = IMAGES) -> torch.Tensor:
    decoder = Decoder(backbone.preprocessing)
    return torch.from_numpy(np.stack([decoder(i).pixels for i in images]))


@pytest.mark.parametrize("model", ["test_vit", "pit_ti_distilled_224"])
def test_embedding_and_scores_are_timms_own(model: str) -> None:
    """fp32 gives forward_head(forward_features(x), pre_logits=True) and softmax(model(x)) to 1e-5."""
    want = oracle.expected(model, IMAGES)
    backbone = Backbone(oracle.module(model), batch_size=3)
    got = backbone(pixels(backbone)).to_numpy()
    assert oracle.relative(got.embedding, want.embedding) < 1e-5
    assert got.norm == pytest.approx(np.linalg.norm(want.embedding, axis=1), rel=1e-5)
    assert got.topk_index is not None
    assert (got.topk_index == np.argsort(-want.scores, axis=1, kind="stable")[:, :5]).all()
    assert oracle.relative(got.topk_score, np.sort(want.scores, axis=1)[:, :-6:-1]) < 1e-5


@pytest.mark.parametrize("model", oracle.SEEDS)
def test_uint8_normalised_on_the_device_is_bit_equal_to_timms_transform(model: str) -> None:
    """Shipping uint8 costs nothing: the normalised batch has the bits of timm's float transform."""
    from PIL import Image

    net = torch.nn.Module()
    net.pretrained_cfg = __import__("timm").get_pretrained_cfg(model).to_dict()
    backbone = Backbone(net)
    import io

    transform = create_transform(**resolve_data_config({}, model=net))
    plain = torch.stack([transform(Image.open(io.BytesIO(i)).convert("RGB")) for i in IMAGES])
    assert torch.equal(backbone.normalize(pixels(backbone)), plain)


@pytest.mark.by_model
@pytest.mark.parametrize("model", oracle.SEEDS)
def test_bf16_keeps_the_embedding_and_a_float32_head(model: str) -> None:
    """In bf16 the embedding's cosine with fp32 is at least 0.9998 and scores do not collapse onto bf16's few values."""
    want = oracle.expected(model, IMAGES[:2]).embedding
    backbone = Backbone(oracle.module(model), precision="bf16", batch_size=2)
    got = backbone(pixels(backbone, IMAGES[:2])).to_numpy()
    cosine = (got.embedding * want).sum(1) / np.linalg.norm(got.embedding, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() >= 0.9998
    assert got.embedding.dtype == np.float32 and got.topk_score is not None
    scores = torch.from_numpy(got.topk_score)
    assert not torch.equal(scores, scores.bfloat16().float())


def test_large_images_come_in_smaller_batches() -> None:
    """The CPU's default batch goes by pixels above 384 x 384, so that memory does not go by --image-size."""
    sizes = ((160, 32), (384, 32), (768, 8), (2048, 1))
    for side, batch in sizes:
        net = build("test_vit", Adapt(image_size=(side, side)))
        assert Backbone(net).batch_size == batch and Backbone(net, batch_size=5).batch_size == 5


@pytest.mark.parametrize(("pad", "tolerance"), [(True, 0.0), (False, 1e-5)])
def test_a_row_does_not_depend_on_how_full_its_batch_is(pad: bool, tolerance: float) -> None:
    """B, B-1 and 1 images give the same rows: to the bit where short batches are padded, else to rounding."""
    backbone = Backbone(oracle.module("test_vit"), batch_size=5, pad=pad)
    images = pixels(backbone)
    full = backbone(images)
    for n in (4, 1):
        part = backbone(images[:n])
        assert oracle.relative(part.embedding.numpy(), full.embedding[:n].numpy()) <= tolerance
        assert torch.equal(part.topk_index, full.topk_index[:n])
        assert oracle.relative(part.topk_score.numpy(), full.topk_score[:n].numpy()) <= tolerance


def test_the_body_runs_once_a_batch() -> None:
    """Embedding and classes come from one pass through forward_features."""
    net = oracle.module("test_vit")
    calls = []
    original = net.forward_features
    net.forward_features = lambda x: calls.append(len(x)) or original(x)
    backbone = Backbone(net, batch_size=5)
    backbone(pixels(backbone))
    assert calls == [5]


class Ties(torch.nn.Module):
    """Every class has the same score."""

    pretrained_cfg = {"input_size": (3, 32, 32), "num_classes": 12}  # noqa: RUF012
    num_classes = 12

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :8]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else torch.ones(len(x), 12)


def test_equal_scores_come_in_the_order_of_their_index() -> None:
    """Top-k of a tie is the lowest indices, in order, on every device."""
    vectors = Backbone(Ties(), batch_size=2, top_k=7)(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert vectors.topk_index is not None
    assert vectors.topk_index.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3


@pytest.mark.parametrize("levels", [2, 6, 10**6])
@pytest.mark.parametrize("count", [1, 5, 12, 13])
def test_the_best_scores_are_those_of_a_stable_sort(levels: int, count: int) -> None:
    """With many equal scores, a few, and none; for as many as there are, and for more."""
    scores = torch.from_numpy(np.random.default_rng(levels).integers(0, levels, (200, 12))).float()
    best, index = ranked(scores, count)
    for row, of_row, at in zip(scores.tolist(), best.tolist(), index.tolist(), strict=True):
        order = sorted(range(12), key=lambda i: -row[i])[:count]
        assert at == order and of_row == [row[i] for i in order]


class SmallMemory(Ties):
    """Fits three images at once."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("simulated")
        return super().forward_features(x)


def test_out_of_memory_halves_the_batch_and_loses_no_row() -> None:
    """The same rows are tried again with half the batch, none lost or repeated, and the size is remembered."""
    images = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 3, 32, 32)
    backbone = Backbone(SmallMemory(), batch_size=11)
    vectors = backbone(images)
    expected = Backbone(Ties(), batch_size=11)(images)
    assert torch.equal(vectors.embedding, expected.embedding)
    assert backbone.batch_size == 2


@pytest.mark.parametrize("fits", [3, 11])
def test_an_engine_is_made_again_for_half_the_batch(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory lacks for the graph, or for a batch later on, it is made for smaller ones; no row is lost."""
    made: list[int] = []

    def start(engine: str, module: torch.nn.Module, taps: Taps, batch: torch.Tensor, *, precision: str) -> Body:
        if len(batch) > fits:
            raise torch.OutOfMemoryError("simulated")
        made.append(len(batch))
        return Eager(taps, batch.device, precision)

    monkeypatch.setattr(engines, "start", start)
    images = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 3, 32, 32)
    backbone = Backbone(SmallMemory(), engine="compile", batch_size=11)
    assert torch.equal(backbone(images).embedding, Backbone(Ties(), batch_size=11)(images).embedding)
    assert made == ([2] if fits == 3 else [11, 5, 2]) and backbone.batch_size == 2


def test_out_of_memory_with_a_single_image_is_raised() -> None:
    """Nothing can be halved below one image: the user sees a sentence, from a graph that does not fit too."""

    class NoMemory(Ties):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("simulated")

    with pytest.raises(NoRoom, match=r"cpu has no room for one image beside the model, .*: simulated"):
        Backbone(NoMemory(), batch_size=4)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(NoRoom, match="cpu has no room for one image with --engine openvino"):
        Backbone(NoMemory(), engine="openvino", batch_size=4)


def test_images_of_another_size_are_refused() -> None:
    """PiT would take 225 x 231 without a word and be wrong."""
    backbone = Backbone(oracle.module("test_vit"), batch_size=2)
    with pytest.raises(ValueError, match="takes uint8"):
        backbone(torch.zeros(1, 3, 225, 231, dtype=torch.uint8))


def test_facts_come_from_the_model_itself() -> None:
    """The embedding's size is what the head gives, not num_features; ImageNet's names when the class count fits."""
    facts = facts_of(oracle.module("mobilenetv3_small_050"), "mobilenetv3_small_050")
    assert (facts.dim, facts.classes, facts.pooling, facts.labels_source) == (1024, 1000, "avg", "imagenet")
    assert facts.label_names[0].startswith("tench")


def test_a_model_without_classifier_has_no_classes() -> None:
    """Pure embedding models give vectors and no made-up classes."""
    facts = facts_of(oracle.module("eva02_tiny_patch14_224"), "eva02_tiny_patch14_224")
    assert (facts.dim, facts.classes, facts.label_names) == (192, 0, ())


def test_labels_must_be_as_many_as_classes(tmp_path) -> None:
    """A label file of another length would shift every name."""
    (tmp_path / "labels.txt").write_text("cat\ndog\n\n")
    assert read_labels(str(tmp_path / "labels.txt"), 2) == ("cat", "dog")
    with pytest.raises(UsageError, match="has 2 names, the model 3 classes"):
        read_labels(str(tmp_path / "labels.txt"), 3)


def test_cuda_is_refused_where_there_is_none() -> None:
    """Asking for a device that is not there ends before any work."""
    if torch.cuda.is_available():
        assert resolve_device("cuda") == "cuda"
    else:
        with pytest.raises(UsageError, match="no CUDA device"):
            resolve_device("cuda")


@pytest.mark.parametrize(("bf16", "amx", "precision"), [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")])
def test_auto_precision_becomes_what_the_processor_has(
    bf16: int, amx: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is bf16 exactly where torch says that the processor multiplies it natively; what was asked stays."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(bf16))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert resolve_precision("auto", "cpu") == precision
    assert [resolve_precision(p, "cpu") for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_becomes_what_the_gpu_has(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that only emulates bf16, as those before Ampere, computes in fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert resolve_precision("auto", "cuda") == ("bf16" if native else "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_gives_the_vectors_of_the_cpu(precision: str) -> None:
    """On a GPU the same images give the same embedding: cosine 0.9998 to fp32 on the CPU, the input bit-equal."""
    want = oracle.expected("pit_ti_224", IMAGES).embedding
    backbone = Backbone(oracle.module("pit_ti_224"), device="cuda", precision=precision, batch_size=4)
    images = pixels(backbone).pin_memory()
    assert torch.equal(backbone.normalize(images).cpu(), Backbone(oracle.module("pit_ti_224")).normalize(images))
    got = backbone(images).to_numpy().embedding
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() >= 0.9998


@pytest.mark.gpu
def test_cuda_out_of_memory_halves_a_real_batch() -> None:
    """With the device's memory nearly full, a batch that does not fit is split, and every row comes out."""
    backbone = Backbone(oracle.module("vgg11"), device="cuda", batch_size=1024)
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 3 * 2**30, dtype=torch.uint8, device="cuda")
    vectors = backbone(torch.zeros(1024, 3, 224, 224, dtype=torch.uint8))
    del hog
    assert len(vectors.embedding) == 1024 and backbone.batch_size < 1024
