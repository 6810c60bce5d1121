"""An encoder and decoder for segmentation, judged by the mean IoU of the classes."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --last 5
ckptavg bn-refresh swa.safetensors -o refreshed.safetensors \
    --model segmentation.py:make_model --loader segmentation.py:train_loader
ckptavg evaluate ckpts/epoch_7.pt swa.safetensors refreshed.safetensors \
    --model segmentation.py:make_model --loader segmentation.py:held_out \
    --metric segmentation.py:mean_iou
"""


def make_model(width=8):
    def block(inputs, outputs, stride=1):
        return nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()

    encoder = *block(1, width), *block(width, 2 * width, stride=2), *block(2 * width, 2 * width)
    decoder = nn.Upsample(scale_factor=2), *block(2 * width, width), nn.Conv2d(width, 3, 1)
    return nn.Sequential(*encoder, *decoder)


def data(seed, count):
    """Noisy images `[count, 1, 24, 24]` of a tall and a wide bar, and the class of each pixel."""
    torch.manual_seed(seed)
    places = 4 + 16 * torch.rand(4, count, 1, 1)
    rows, columns = torch.arange(24)[:, None] - places[:2], torch.arange(24) - places[2:]
    tall, wide = ((rows / x).abs().maximum((columns / y).abs()) < 1 for x, y in ((8, 3), (3, 8)))
    masks = torch.where(tall[0], 2, wide[1].long())
    return TensorDataset((masks > 0)[:, None] + torch.randn(count, 1, 24, 24), masks)


def train_loader(seed=0):
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(data(1, 256), batch_size=16, shuffle=True, generator=shuffle)


def held_out():
    return DataLoader(data(2, 200), batch_size=50)


def mean_iou(model, batches):
    predicted, masks = zip(*[(model(images).argmax(1), masks) for images, masks in batches])
    predicted, masks = torch.cat(predicted), torch.cat(masks)
    hits = [((predicted == k) & (masks == k), (predicted == k) | (masks == k)) for k in range(3)]
    return sum(both.sum() / either.sum() for both, either in hits) / 3


def main():
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    Path("ckpts").mkdir()
    for epoch in range(8):
        for images, masks in train_loader(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), masks).backward()
            optimizer.step()
        torch.save({"model": model.state_dict(), "epoch": epoch}, f"ckpts/epoch_{epoch}.pt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
