"""Networks of timm: the head is found, and what it returns is what the network returns."""

import pytest
import torch
from torch import nn

from robustood.models import adapt

pytestmark = pytest.mark.oracle
HEADS = {
    "resnet18": "fc", "vit_tiny_patch16_224": "head", "convnext_atto": "head.fc", "mobilenetv3_small_050": "classifier",
    "regnetx_002": "head.fc", "efficientvit_b0": "head.classifier.4", "mixer_s32_224": "head",
    "dla34": "fc",  # a 1 x 1 convolution
}  # fmt: skip


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip(
        "timm", reason="timm is not installed: pip install --no-deps timm==1.0.31"
    )


def network(timm, name):
    """Random weights; heads that start at zero get some, so that outputs differ."""
    torch.manual_seed(0)
    inner = timm.create_model(name, pretrained=False, num_classes=12).eval()
    for p in inner.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return inner


@pytest.mark.parametrize("name", HEADS)
def test_adapt_finds_the_head_of_each_family(timm, name):
    inner = network(timm, name)
    size = 224 if name.endswith("224") else 64
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = adapt(inner)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.features(x)), inner(x), rtol=1e-4, atol=1e-5)
    assert (model.where, model.classes) == (HEADS[name], 12)


def test_the_mean_of_two_heads_is_refused(timm):
    inner = network(timm, "deit_tiny_distilled_patch16_224")
    with pytest.raises(ValueError, match=r"\['head', 'head_dist'\].*a mean of several heads"):
        adapt(inner)(torch.rand(2, 3, 224, 224))
