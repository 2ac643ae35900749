"""Networks are made for the run's image size; a size that one cannot take is one line with a size that works."""

import pytest
import torch

from fastkd.errors import UserError
from fastkd.models import create_model, stage_shapes
from fastkd.models.zoo import hidden_kernels


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "torchvision/googlenet"])
def test_made_for_the_size_and_gives_logits_alone(name):
    net = create_model(name, 3, image_size=32)
    assert net.training and net(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert len(stage_shapes(net)) == 4


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_input_of_a_file_is_that_of_the_pretrained_weights(name):
    """torchvision converts the images of the pre-trained network alone, and a file does not say that it did."""
    assert create_model(f"torchvision/{name}", 3, image_size=96).transform_input


@pytest.mark.parametrize(("name", "size", "works"), [("timm/levit_128s", 200, 208), ("vgg8", 4, 8)])
def test_a_size_that_does_not_fit(name, size, works):
    with pytest.raises(UserError, match=rf"{name} cannot take images of {size} x {size} .*; {works} x {works} works"):
        create_model(name, 3, image_size=size)


def test_patches_that_do_not_fit():
    for size, lost in ((100, "4 rows and 4 columns"), (97, "1 row and 1 column")):
        words = f"patches of 16 x 16 pixels, and {size} is no multiple: {lost} would be lost; use 96 or 112"
        with pytest.raises(UserError, match=words):
            create_model("timm/vit_tiny_patch16_224", 3, image_size=size)


def test_a_local_folder_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    with hidden_kernels():  # the test runs beside the folder kernels/
        import transformers

        transformers.utils.is_kernels_available()
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 1], num_labels=3)
    net = transformers.ResNetForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    ours = create_model(f"hf/{tmp_path}", 3, "pretrained", image_size=32).eval()
    assert torch.equal(ours(x), net(x).logits) and list(ours.state_dict()) == list(net.state_dict())
    assert stage_shapes(ours) == [(8, 8, 8), (8, 4, 4), (16, 2, 2)]
    with pytest.raises(UserError, match="was trained for 3 classes"):
        create_model(f"hf/{tmp_path}", 4, "pretrained")
