"""A detector: lists of images, FrozenBatchNorm2d in the backbone, BatchNorm in the head."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet, anchor_utils, retinanet
from torchvision.ops import FrozenBatchNorm2d, box_iou

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --last 5
ckptavg bn-refresh swa.safetensors -o refreshed.safetensors \
    --model detection.py:make_model --loader detection.py:train_loader --forward detection.py:call
ckptavg evaluate ckpts/model_8.pth swa.safetensors refreshed.safetensors \
    --model detection.py:make_model --loader detection.py:held_out --metric detection.py:recall
"""


def make_backbone(norm):
    backbone = nn.Sequential()
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        backbone += nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), norm(outputs), nn.ReLU())
    backbone.out_channels = 32
    return backbone


def make_model():
    backbone = make_backbone(FrozenBatchNorm2d)
    anchors = anchor_utils.AnchorGenerator(((20,),), ((1.0,),))
    head = retinanet.RetinaNetHead(32, 1, num_classes=3, norm_layer=nn.BatchNorm2d)
    return RetinaNet(backbone, 3, 64, 64, anchor_generator=anchors, head=head)


def call(model, batch):
    return model(batch[0])


def data(seed, count):
    """Images `[3, 64, 64]`, each with an object of class 1 and one of class 2, and targets."""
    torch.manual_seed(seed)
    examples = []
    for image in 0.3 * torch.rand(count, 3, 64, 64):
        boxes = torch.randint(0, 40, (2, 2)).repeat(1, 2) + torch.tensor([0, 0, 20, 20])
        boxes[:, 2:] += torch.randint(-4, 5, (2, 2))
        for color, (left, top, right, bottom) in enumerate(boxes):
            image[color, top:bottom, left:right] += 0.3
        examples.append((image, {"boxes": boxes.float(), "labels": torch.tensor([1, 2])}))
    return examples


def collate(examples):
    return tuple(zip(*examples))


def train_loader(seed=0):
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(data(1, 128), 8, shuffle=True, generator=shuffle, collate_fn=collate)


def held_out():
    return DataLoader(data(2, 200), batch_size=50, collate_fn=collate)


def recall(model, batches):
    """The share of objects that are among the image's first two detections, with an IoU of 0.7."""
    hits = []
    for images, targets in batches:
        for detections, target in zip(model(images), targets):
            same = detections["labels"][:2, None] == target["labels"]
            hits.append((same & (box_iou(detections["boxes"][:2], target["boxes"]) > 0.7)).any(0))
    return torch.cat(hits).float().mean()


def main():
    torch.manual_seed(0)
    model, pretrained = make_model(), make_backbone(nn.BatchNorm2d)
    update_bn([torch.stack(images) for images, _ in train_loader()], pretrained)
    model.backbone.load_state_dict(pretrained.state_dict(), strict=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    Path("ckpts").mkdir()
    for epoch in range(9):
        for images, targets in train_loader(epoch):
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()
        torch.save({"model": model.state_dict(), "epoch": epoch}, f"ckpts/model_{epoch}.pth")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
