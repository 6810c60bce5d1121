"""Fine-tuning with the backbone's BatchNorm frozen: only the head's is refreshed."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --last 5
ckptavg bn-refresh swa.safetensors -o refreshed.safetensors \
    --model frozen_backbone.py:Net --loader frozen_backbone.py:train_loader
ckptavg evaluate ckpts/epoch_7.pt swa.safetensors refreshed.safetensors \
    --model frozen_backbone.py:Net --loader frozen_backbone.py:held_out
"""


class Net(nn.Module):
    def __init__(self, frozen=True):
        super().__init__()
        self.frozen = frozen
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        )
        head = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)  # its BatchNorm stays in eval mode
        return self

    def forward(self, images):
        return self.head(self.backbone(images))


def data(seed, count, gain):
    """Noisy images `[count, 3, 12, 12]`, of a contrast up to `1 + gain`, of four classes."""
    torch.manual_seed(seed)
    labels, images = torch.randint(4, (count,)), torch.randn(count, 3, 12, 12)
    for k in range(4):
        images[labels == k, k % 3, 3 * k : 3 * k + 3] += 0.5
    return TensorDataset(images * (1 + gain * torch.rand(count, 1, 1, 1)), labels)


def train_loader(seed=0, gain=3):
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(data(1, 512, gain), batch_size=16, shuffle=True, generator=shuffle)


def held_out():
    return DataLoader(data(2, 1000, gain=3), batch_size=100)


def fit(model, epochs, gain):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader(epoch, gain):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        yield {"model": model.state_dict(), "epoch": epoch}


def main():
    torch.manual_seed(0)
    *_, pretrained = fit(Net(frozen=False), epochs=4, gain=0)
    model = Net()
    model.load_state_dict(pretrained["model"])
    Path("ckpts").mkdir()
    for checkpoint in fit(model, epochs=8, gain=3):
        torch.save(checkpoint, f"ckpts/epoch_{checkpoint['epoch']}.pt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
