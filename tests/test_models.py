"""Models by name, their classifiers, and batch-norm statistics that can be held."""

import re
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchkern import models
from batchkern.errors import UserError
from batchkern.models import BUILT_IN, build, find_classifier, frozen_statistics, has_batch_norm


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slowed down by a second thread, tenfold where the tests share their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [("resnet20", 0.27e6), ("resnet44", 0.66e6), ("resnet56", 0.85e6)],  # He et al. 2015, table 6
)
def test_resnet_parameter_counts(name, published):
    assert round(count(build(name, shape=(3, 32, 32), classes=10)) / 1e6, 2) * 1e6 == published


def test_resnet_parameters_by_hand():
    # 6n + 2 layers, convolutions without bias, two numbers per batch-norm channel, no shortcut parameters.
    n = 3
    convolutions = 9 * (3 * 16 + 2 * n * 16 * 16 + 16 * 32 + (2 * n - 1) * 32 * 32 + 32 * 64 + (2 * n - 1) * 64 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    model = build("resnet20", shape=(3, 32, 32), classes=10)
    assert count(model) == convolutions + norms + 650
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == 20


def test_wide_resnet_parameters_by_hand():
    n, k = 3, 10
    widths = [16, 16 * k, 32 * k, 64 * k]
    expected = 27 * 16 + 2 * widths[3] + 10 * widths[3] + 10  # the first convolution, the last norm, the classifier
    for before, width in pairwise(widths):
        expected += 9 * before * width + 9 * (2 * n - 1) * width**2 + before * width  # the last is the shortcut
        expected += 2 * (before + (2 * n - 1) * width)
    model = build("wrn22-10", shape=(3, 32, 32), classes=10)
    assert count(model) == expected
    assert round(count(model) / 1e6, 1) == 26.8  # Zagoruyko & Komodakis 2016, table 4
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 22  # their depth counts the shortcuts


@pytest.mark.parametrize(
    ("name", "shape", "classes", "published"),
    [
        ("wrn18-2", (3, 224, 224), 1000, 45.6),  # Zagoruyko & Komodakis 2016, table 8
        ("alexnet", (3, 224, 224), 1000, 61.1),  # torchvision's
        ("alexnet", (3, 32, 32), 10, 2.47),
        # 13 convolutions with two numbers a channel, two layers of 512 and the classifier
        ("vgg16-cifar", (3, 32, 32), 10, (14_710_464 + 2 * 4224 + 2 * (512 * 512 + 512) + 5130) / 1e6),
    ],
)
def test_parameters_of_networks_from_elsewhere(name, shape, classes, published):
    with torch.device("meta"):
        model = build(name, shape=shape, classes=classes)
        assert model(torch.empty(2, *shape)).shape == (2, classes)
    assert count(model) / 1e6 == pytest.approx(published, abs=0.05 if published > 20 else 0.005)


def test_alexnet_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = (
        build("alexnet", shape=(3, 80, 96), classes=7).eval(),
        torchvision.models.alexnet(num_classes=7).eval(),
    )
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 80, 96)
    torch.testing.assert_close(ours(images), theirs(images))


def test_wide_resnet_of_18_layers_is_a_resnet_18_where_it_is_as_wide():
    timm = pytest.importorskip("timm")
    ours, theirs = models.WideResNet18(1, 3, 7).eval(), timm.create_model("resnet18", num_classes=7).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(ours(images), theirs(images))


def test_wide_resnet_blocks_are_activated_before_their_convolutions():
    first, second, *_ = build("wrn22-10", shape=(3, 32, 32), classes=10).blocks
    for block in (first, second):
        nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    x = torch.randn(2, 16, 6, 6)
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = F.conv2d(F.relu(normalised), first.shortcut.weight)
    torch.testing.assert_close(first(x), expected)
    y = torch.randn(2, 160, 6, 6)
    assert torch.equal(second(y), y)


def test_resnet_shortcut_is_option_a():
    block = build("resnet8", shape=(3, 32, 32), classes=10).stage2[0]
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 9, 8)
    out = block(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(out[:, 16:], torch.zeros(2, 16, 5, 4))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 7, 12)])  # the least, and odd, and not square
def test_built_in_models_take_any_image(name, shape):
    model = build(name, shape=shape, classes=7)
    images = torch.randn(5, *shape)
    logits = model(images)
    assert logits.shape == (5, 7)
    F.cross_entropy(logits, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    key, head = find_classifier(model)
    assert key == "fc"
    assert head.out_features == 7
    assert has_batch_norm(model) == (name not in ("mlp", "cnn", "alexnet"))
    # Rows are independent in eval mode, and images matter.
    model.eval()
    rows = model(images)
    torch.testing.assert_close(rows[2:3], model(images[2:3]))
    assert not torch.allclose(rows[0], rows[1])


def test_cnn_learns_digits():
    data = pytest.importorskip("batchkern.data")
    pytest.importorskip("sklearn")
    train, test = data.load_pair("digits")
    mean, std = train.statistics()
    feed = data.Feed(train, mean=mean, std=std, device="cpu")
    torch.manual_seed(0)
    model = build("cnn", shape=train.shape, classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        for indices in torch.randperm(len(train)).split(64):
            images, labels = feed.batch(indices, None)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    images, labels = data.Feed(test, mean=mean, std=std, device="cpu").batch(torch.arange(len(test)), None)
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


def test_build_refuses_bad_arguments():
    with pytest.raises(UserError, match=r"shape must be .*, not \(3, 3, 32\)"):
        build("cnn", shape=(3, 3, 32), classes=10)
    with pytest.raises(UserError, match="classes must be at least 2, not 1"):
        build("cnn", shape=(3, 8, 8), classes=1)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"'vgg11'.*cnn, resnet8, .*pip install 'batchkern\[models\]'"):
        build("vgg11", shape=(3, 32, 32), classes=10)


def test_timm_models():
    pytest.importorskip("timm")
    model = build("resnet10t", shape=(1, 32, 32), classes=6)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 6)
    assert find_classifier(model) == ("fc", model.fc)
    # Its grid of patches is laid out for the images at hand, not for 224 x 224.
    model = build("vit_tiny_patch16_224", shape=(3, 32, 48), classes=6)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 6)
    assert find_classifier(model) == ("head", model.head)


def test_timm_names_and_failures():
    timm = pytest.importorskip("timm")
    with pytest.raises(
        UserError, match=r"'resnet2O': the built-in models are mlp, cnn, resnet8, .*near matches: .*resnet20"
    ):
        build("resnet2O", shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match=r"near matches: .*efficientnet_b0"):
        build("eficientnet_b0", shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match="unknown model 'hf-hub:someone/model'"):
        build("hf-hub:someone/model", shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match=r"'resnet18.nope' of timm cannot be built .*: Invalid pretrained tag"):
        build("resnet18.nope", shape=(3, 32, 32), classes=10)

    def fails(*args, **options):
        raise RuntimeError("window too large")

    timm.create_model, create_model = fails, timm.create_model
    try:
        with pytest.raises(UserError, match=r"'resnet10t' of timm cannot be built .*\(3, 32, 32\): window too large"):
            build("resnet10t", shape=(3, 32, 32), classes=10)
    finally:
        timm.create_model = create_model


class Head(nn.Module):
    """A classifier that is not the last Linear to be registered."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.gate = nn.Linear(3, 3)

    def get_classifier(self):
        return self.head


def test_find_classifier():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 2)), nn.Flatten())
    assert find_classifier(model) == ("2.0", model[2][0])
    assert find_classifier(model, "0") == ("0", model[0])
    with pytest.raises(UserError, match=re.escape("'1' is a ReLU, not a Linear; its Linear modules are 0, 2.0")):
        find_classifier(model, "1")
    with pytest.raises(UserError, match=re.escape("'fc' is not in the model; its Linear modules are 0, 2.0")):
        find_classifier(model, "fc")
    with pytest.raises(UserError, match="it has no Linear module"):
        find_classifier(nn.Sequential(nn.Conv2d(1, 1, 1)))
    model = Head(nn.Linear(3, 7))
    assert find_classifier(model) == ("head", model.head)
    with pytest.raises(UserError, match=r"the classifier of Head is a Conv2d, not a Linear; name another: .* gate"):
        find_classifier(Head(nn.Conv2d(3, 7, 1)))
    assert find_classifier(Head(nn.Conv2d(3, 7, 1)), "gate")[0] == "gate"


def statistics_of(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics(momentum):
    torch.manual_seed(0)
    model = build("resnet8", shape=(3, 8, 8), classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    images = torch.randn(6, 3, 8, 8) * 3 + 1
    model(images)  # running statistics that are neither the initial ones nor the batch's
    before = statistics_of(model)
    assert len(before) == 3 * 7
    with frozen_statistics(model):
        frozen = model(images)
    assert same(before, statistics_of(model))
    # It normalised as train mode does: with the batch's statistics, and that shows.
    plain = model(images)
    assert torch.equal(frozen, plain)
    assert not same(before, statistics_of(model))
    assert not torch.allclose(frozen, model.eval()(images))


def test_frozen_statistics_leaves_eval_mode_alone():
    model = build("resnet8", shape=(3, 8, 8), classes=4)
    images = torch.randn(6, 3, 8, 8) * 3 + 1
    model(images)
    model.eval()
    expected = model(images)
    before = statistics_of(model)
    with frozen_statistics(model):
        assert torch.equal(model(images), expected)
    assert same(before, statistics_of(model))


def test_frozen_statistics_are_thawed_after_an_exception():
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm2d(3), untracked)

    def fail():
        with frozen_statistics(model):
            with frozen_statistics(model):
                pass
            model(torch.randn(4, 3, 2, 2))  # still frozen after the inner block
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert int(model[0].num_batches_tracked) == 0
    assert model[0].track_running_stats
    assert not untracked.track_running_stats
    model(torch.randn(4, 3, 2, 2))
    assert int(model[0].num_batches_tracked) == 1


def test_has_batch_norm():
    assert has_batch_norm(nn.Sequential(nn.Sequential(nn.BatchNorm1d(2))))
    assert not has_batch_norm(nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2)))
