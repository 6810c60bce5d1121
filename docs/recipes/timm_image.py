"""timm: its model without any code, checkpoints of its `CheckpointSaver`."""

import subprocess
from pathlib import Path

import timm
import torch
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg average ckpts -o swa.pth.tar --last 5
ckptavg bn-refresh swa.pth.tar -o refreshed.pth.tar --model timm:create_model \
    --model-arg model_name=test_resnet --model-arg num_classes=4 --loader timm_image.py:train_loader
ckptavg evaluate ckpts/last.pth.tar swa.pth.tar refreshed.pth.tar \
    --model timm:create_model --model-arg model_name=test_resnet --model-arg num_classes=4 \
    --loader timm_image.py:held_out
"""


def data(seed, count):
    """Noisy images `[count, 3, 32, 32]` with a bright stripe at one of four places."""
    torch.manual_seed(seed)
    labels, images = torch.randint(4, (count,)), torch.randn(count, 3, 32, 32)
    for k in range(4):
        images[labels == k, k % 3, 8 * k : 8 * k + 8] += 0.3
    return TensorDataset(images, labels)


def train_loader(seed=0):
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(data(1, 256), batch_size=16, shuffle=True, generator=shuffle)


def held_out():
    return DataLoader(data(2, 500), batch_size=100)


def main():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Path("ckpts").mkdir()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir="ckpts", recovery_dir="ckpts")
    for epoch in range(8):
        for images, labels in train_loader(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        saver.save_checkpoint(epoch)
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
