"""The last layers of a network once more: which they are, and that a network is left as it was."""

import copy

import pytest
import torch
from torch import nn
from training import Net, net

from batchkern import models
from batchkern.errors import UserError
from batchkern.second_head import in_place, second_head

IMAGES = torch.zeros(2, 3, 32, 32)


class Vgg(nn.Module):
    """A VGG in small, as torchvision writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class NormAtTheEnd(nn.Module):
    """Batch norm behind the last convolution belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


class Twice(nn.Module):
    """A layer that runs in the trunk and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(self.mix(torch.ones(4)).sum() * x).mean(dim=(2, 3))
        return self.fc(self.mix(x))


@pytest.mark.parametrize(
    ("shared", "copied"),
    [
        ("convolutions", ["classifier.0", "classifier.1", "classifier.4", "classifier.6"]),
        ("features", ["classifier.0", "classifier.1", "classifier.4", "classifier.6"]),
        ("classifier.1", ["classifier.4", "classifier.6"]),
        ("classifier.3", ["classifier.4", "classifier.6"]),
        ("all but the classifier", ["classifier.6"]),
    ],
)
def test_what_is_not_shared_is_copied(shared, copied):
    model = Vgg()
    head = second_head(model, 7, IMAGES, shared=shared)
    assert list(head) == [name.replace(".", "/") for name in copied]
    for name in copied[:-1]:
        own, copy_of = model.get_submodule(name), head[name.replace(".", "/")]
        assert copy_of is not own
        for (key, value), (other_key, other) in zip(
            own.state_dict().items(), copy_of.state_dict().items(), strict=True
        ):
            assert key == other_key
            assert torch.equal(value, other)
            assert value.data_ptr() != other.data_ptr()
    assert head["classifier/6"].weight.shape == (7, 8)


def test_without_convolutions_all_but_the_classifier_is_shared():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 5))
    assert list(second_head(model, 3, IMAGES)) == ["3"]


def test_only_the_classifier_is_behind_batch_norm_and_the_last_convolution():
    assert list(second_head(NormAtTheEnd(), 3, IMAGES)) == ["fc"]


@pytest.mark.parametrize(
    ("name", "copied"),
    [("cnn", ["hidden", "fc"]), ("resnet8", ["fc"]), ("vgg11_bn", ["pre_logits/fc1", "pre_logits/fc2", "head/fc"])],
)
def test_networks_by_name(name, copied):
    """timm's VGG has its linear layers as convolutions that cover the whole image."""
    if name == "vgg11_bn":
        pytest.importorskip("timm")
    assert list(second_head(models.build(name, shape=(3, 32, 32), classes=5), 3, IMAGES)) == copied


def test_a_model_runs_with_the_copies_and_then_with_its_own():
    model = Vgg().eval()
    head = second_head(model, 7, IMAGES).eval()
    x = torch.rand(2, 3, 32, 32)
    before, state = model(x), copy.deepcopy(model.state_dict())
    features = model.features(x).flatten(1)
    expected = nn.Sequential(head["classifier/0"], head["classifier/1"], nn.ReLU(), head["classifier/4"], nn.ReLU())
    with in_place(model, head):
        assert torch.equal(model(x), head["classifier/6"](expected(features)))
    with pytest.raises(ZeroDivisionError), in_place(model, head):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert not model.training


def test_a_layer_under_two_names_is_replaced_under_both():
    model = Net()
    model.alias = model.fc
    head = second_head(model, 3, torch.zeros(2, 1, 6, 6))
    with in_place(model, head):
        assert model.alias is model.fc is head["fc"]


def test_frozen_layers_are_copied_as_layers_that_train():
    model = net()
    model.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in second_head(model, 3, torch.zeros(2, 1, 6, 6)).parameters())


class WithScale(nn.Module):
    """Something behind the classifier that has a number for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.scale * self.fc(self.conv(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (Vgg(), {"shared": "nothing"}, r"shared must be 'convolutions', .* got 'nothing'"),
        (
            Vgg(),
            {"shared": "classifier.6"},
            r"shared is 'classifier.6', but the classifier 'classifier.6' is a part of",
        ),
        (Vgg(), {"shared": ""}, r"shared is '', but the classifier"),
        (Twice(), {}, r"the layer 'mix' runs before and after the end of that part"),
        (WithScale(), {}, r"the model cannot have a second head: The size of tensor"),
        (Vgg(), {"classifier": "features.0"}, r"classifier 'features.0' is a Conv2d"),
    ],
)
def test_what_cannot_be_cut_is_refused(model, options, said):
    with pytest.raises(UserError, match=said):
        second_head(model, 7, IMAGES, **options)
